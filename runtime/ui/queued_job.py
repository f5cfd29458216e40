"""A job of the page: the images to generate, and the events that show its progress."""

import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from threading import Condition
from typing import Any

from ...schemas.request import Request
from ...schemas.stages import Stage
from .models import Choice

QUEUED, OPENING, STARTED, NOTES, STEP, PREVIEW = "queued", "opening", "started", "notes", "step", "preview"
DONE, ERROR, CANCELLED = "done", "error", "cancelled"  # the last event is one of these
FINAL = (DONE, ERROR, CANCELLED)


@dataclass(frozen=True)
class PageRequest:
    """One submission of the page: requests of one group, which can be computed together, and what they run on.

    The steps of the stages in `previews` are shown as pictures."""

    choice: Choice
    requests: tuple[Request, ...]
    previews: frozenset[Stage] = frozenset()


@dataclass(frozen=True)
class JobEvent:
    """One event of a job. `version` counts the events of the job. A later event of the same name replaces this one."""

    version: int
    name: str
    data: Mapping[str, Any]


class QueuedJob:
    """A job in the queue, with the latest event of each name. Safe to use from several threads.

    A browser that connects late or reads slowly gets the present state and skips the history."""

    def __init__(self, request: PageRequest) -> None:
        self.id = secrets.token_hex(8)
        self.request = request
        self.images: list[dict[str, Any]] = []  # as the gallery describes them
        self.cancelled = False
        self._changed = Condition()
        self._latest: dict[str, JobEvent] = {}
        self._version = 0

    @property
    def finished(self) -> bool:
        return any(name in self._latest for name in FINAL)

    def publish(self, name: str, **data: Any) -> None:
        """Put an event in place of the last one of this name. After a final event, further events are ignored."""
        with self._changed:
            if self.finished:
                return
            self._version += 1
            if name in FINAL:
                self._latest.pop(PREVIEW, None)
            self._latest[name] = JobEvent(self._version, name, data)
            self._changed.notify_all()

    def events(self, after: int = 0, beat: float = 15.0) -> Iterator[JobEvent | None]:
        """Yield the events since version `after` until the job is over, and None after `beat` seconds without any."""
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
        """The job as the page lists it. "steps" are the steps of each stage; an initial picture may shorten them."""
        first = self.request.requests[0]
        settings = first.settings
        given = {Stage.PRIOR: settings.prior_timesteps, Stage.DECODER: settings.decoder_timesteps}
        steps = {Stage.PRIOR: settings.prior_steps, Stage.DECODER: settings.decoder_steps}
        steps |= {stage: len(ratios) - 1 for stage, ratios in given.items() if ratios}
        size = {"width": settings.width, "height": settings.height}
        chosen = {"bundle": self.request.choice.bundle, "engine": self.request.choice.engine}
        images = len(self.request.requests)
        return {"id": self.id, "prompt": first.prompt, "images": images, "steps": steps, **size, **chosen}
