"""A job of the page: what to draw, and what whoever watches it is told."""

import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from threading import Condition
from typing import Any

from ...schemas.request import Request
from ...schemas.stages import Stage

QUEUED, STARTED, NOTES, STEP, PREVIEW = "queued", "started", "notes", "step", "preview"
DONE, ERROR, CANCELLED = "done", "error", "cancelled"  # the last event is one of these
FINAL = (DONE, ERROR, CANCELLED)


@dataclass(frozen=True)
class Order:
    """Requests to draw, all of one group, and the stages whose steps are shown as pictures."""

    requests: tuple[Request, ...]
    previews: frozenset[Stage] = frozenset()


@dataclass(frozen=True)
class Event:
    """`version` counts the events of a job; a later event of the same name replaces this one."""

    version: int
    name: str
    data: Mapping[str, Any]


class Job:
    """Keeps the latest event of each name, so that whoever comes late or is slow sees how things stand, not how they
    went. Safe to use from several threads."""

    def __init__(self, order: Order) -> None:
        self.id = secrets.token_hex(8)
        self.order = order
        self.images: list[dict[str, Any]] = []  # as the gallery describes them
        self.cancelled = False
        self._changed = Condition()
        self._latest: dict[str, Event] = {}
        self._version = 0

    @property
    def finished(self) -> bool:
        return any(name in self._latest for name in FINAL)

    def tell(self, name: str, **data: Any) -> None:
        """Put an event in place of the last one of this name. After a final event nothing more is said."""
        with self._changed:
            if self.finished:
                return
            self._version += 1
            if name in FINAL:
                self._latest.pop(PREVIEW, None)
            self._latest[name] = Event(self._version, name, data)
            self._changed.notify_all()

    def events(self, after: int = 0, beat: float = 15.0) -> Iterator[Event | None]:
        """What is new since version `after`, until the job is over; None when nothing was for `beat` seconds."""
        while True:
            with self._changed:
                self._changed.wait_for(partial(self._has_news, after), beat)
                new = sorted((e for e in self._latest.values() if e.version > after), key=lambda e: e.version)
                over = self.finished
            yield from new
            if over:
                return
            if new:
                after = new[-1].version
            else:
                yield None

    def _has_news(self, after: int) -> bool:
        return self._version > after or self.finished

    def to_json(self) -> dict[str, Any]:
        """What to call it while it waits, and the steps it will take unless a picture to begin with saves some."""
        first = self.order.requests[0]
        settings = first.settings
        given = {Stage.PRIOR: settings.prior_timesteps, Stage.DECODER: settings.decoder_timesteps}
        steps = {Stage.PRIOR: settings.prior_steps, Stage.DECODER: settings.decoder_steps}
        steps |= {stage: len(ratios) - 1 for stage, ratios in given.items() if ratios}
        size = {"width": settings.width, "height": settings.height}
        return {"id": self.id, "prompt": first.prompt, "images": len(self.order.requests), "steps": steps, **size}
