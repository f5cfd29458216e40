"""The choices of the page: bundles, engines and LoRAs by their names, and the one cascade that is open for a choice.

A request of the page names these; it never holds a path. Names are looked up in the folder of bundles and in the list
of LoRAs that the server was started with.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ...schemas.errors import UsageError
from ...schemas.limits import MAX_WEIGHT
from ...schemas.manifest import Manifest
from ...schemas.messages import shown
from ...schemas.stages import Stage
from ...storage.bundle import open_bundle
from ...storage.bundle_lock import is_bundle
from ..cascade import Cascade
from ..engines.engine_table import AUTO, ENGINES, EngineInfo

MOST_BUNDLES = 200  # that are listed of a folder
MOST_LORAS = 8  # at once

ChosenLora = tuple[str, float]  # a LoRA as `--lora` names it, and its strength


@dataclass(frozen=True)
class Choice:
    """The bundle, engine and LoRAs of a job: the bundle by its name on the page, LoRAs as `--lora` names them."""

    bundle: str
    engine: str = AUTO
    loras: tuple[ChosenLora, ...] = ()


Opener = Callable[[Path, str, Sequence[ChosenLora]], Cascade]
"""Opens a bundle on the engine of that name, with LoRAs merged into its weights."""


def bundles_at(path: Path) -> dict[str, Path]:
    """The bundles in the folder `path`, or beside the bundle `path`, by name. A bundle at `path` comes first.

    Raises UsageError when `path` is no bundle and holds none."""
    place = Path(os.path.abspath(path))  # links stay: beside a link to a bundle are the bundles of the link's folder
    given = {place.name: path} if is_bundle(path) else {}
    found = given | {child.name: child for child in _bundles_in(place.parent if given else place)}
    if not found:
        open_bundle(path)  # which says how to make one
    return dict(list(found.items())[:MOST_BUNDLES])


def _bundles_in(folder: Path) -> Iterator[Path]:
    with suppress(OSError):
        for child in sorted(folder.iterdir()):
            with suppress(OSError, UnicodeEncodeError):
                if not child.name.startswith(".") and child.name.encode() and is_bundle(child):
                    yield child


@dataclass
class Models:
    """The choices of one server. Used by many threads, except `cascade`, which belongs to the queue's.

    `path` is a bundle or a folder of bundles. `loras` returns those that the page may choose: each name on the page,
    and what `--lora` takes for it. The page begins with `engine` and `first_loras`. `stages` come from other bundles.
    `device` is "cpu" or "cuda"."""

    path: Path
    opener: Opener
    engine: str = AUTO
    device: str = "cpu"
    first_loras: tuple[ChosenLora, ...] = ()
    loras: Callable[[], Mapping[str, str]] = dict
    stages: Mapping[Stage, Path] = field(default_factory=dict)
    _opened: tuple[Choice, Cascade] | None = None

    @property
    def bundles(self) -> dict[str, Path]:
        """The bundles of the page, by name."""
        return bundles_at(self.path)

    @property
    def first(self) -> Choice:
        """The choice that the page begins with."""
        return Choice(next(iter(self.bundles)), self.engine, self.first_loras)

    def manifest(self, bundle: str) -> Manifest:
        """The manifest of a bundle, with the stages that come from others. Raises UsageError for an unknown name."""
        manifest = open_bundle(self._bundle(bundle)).manifest
        entries = {stage: open_bundle(path).entry(stage) for stage, path in self.stages.items()}
        return manifest.model_copy(update={"stages": {**manifest.stages, **entries}})

    def engines(self, manifest: Manifest) -> list[str]:
        """The engines for a bundle: those whose library is installed, and TensorRT if the bundle has plans for it."""
        plans = {plan.backend for entry in manifest.stages.values() for plan in entry.plans}
        return [AUTO, *(name for name, info in ENGINES.items() if self._can_run(name, info, plans))]

    def _can_run(self, name: str, info: EngineInfo, plans: Collection[str]) -> bool:
        able = name in plans if info.library.startswith("tensorrt") else self.device in info.devices
        return able and find_spec(info.library.replace("-", "_")) is not None

    def choice(self, bundle: Any, engine: Any, loras: Any) -> Choice:
        """The choice of a request; None stands for what the page begins with.

        Raises UsageError for a bundle, engine or LoRA that the page does not offer."""
        first = self.first
        found = first.bundle if bundle is None else bundle
        able = [first.engine, *self.engines(self.manifest(found))]
        if engine is not None and engine not in able:
            raise UsageError(f"engine {shown(engine)}: expected one of {', '.join(dict.fromkeys(able))}")
        return Choice(found, engine or first.engine, first.loras if loras is None else self._chosen(loras))

    def offered_loras(self) -> dict[str, str]:
        """The LoRAs as `--lora` takes them, by their names on the page."""
        listed = self.loras()
        taken = set(listed.values())
        return {**listed, **{lora: lora for lora, _ in self.first_loras if lora not in taken}}

    def _bundle(self, name: Any) -> Path:
        found = self.bundles
        if not isinstance(name, str) or name not in found:
            raise UsageError(f"bundle {shown(name)}: expected one of {', '.join(found)}")
        return found[name]

    def _chosen(self, loras: Any) -> tuple[ChosenLora, ...]:
        if not isinstance(loras, list) or len(loras) > MOST_LORAS:
            raise UsageError(f"loras: expected a list of at most {MOST_LORAS}")
        return tuple(self._lora(each) for each in loras)

    def _lora(self, given: Any) -> ChosenLora:
        if not isinstance(given, dict) or not given.keys() <= {"name", "strength"}:
            raise UsageError("loras: expected each as {name, strength}")
        offered, name = self.offered_loras(), given.get("name")
        if not isinstance(name, str) or name not in offered:
            raise UsageError(
                f"loras: {shown(name)} is not offered here; expected one of {', '.join(offered) or 'none'}; "
                "name their folders in $CASCADEKIT_LORAS, or start: cascadekit ui BUNDLE --lora-folder FOLDER"
            )
        try:
            strength = float(given.get("strength", 1.0))
        except (TypeError, ValueError, OverflowError):
            strength = MAX_WEIGHT * 2
        if not -MAX_WEIGHT <= strength <= MAX_WEIGHT:
            raise UsageError(f"loras: {name}: expected a strength of -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
        return offered[name], strength

    def is_open(self, choice: Choice) -> bool:
        return self._opened is not None and self._opened[0] == choice

    def cascade(self, choice: Choice) -> Cascade:
        """The cascade of a choice. It is opened if another one is open, which is closed first.

        Raises the errors of `Cascade.open` and of merging LoRAs."""
        if self._opened is not None and self._opened[0] != choice:
            self.close()
        if self._opened is None:
            self._opened = choice, self.opener(self._bundle(choice.bundle), choice.engine, choice.loras)
        return self._opened[1]

    def close(self) -> None:
        """Free the memory of the cascade that is open."""
        if self._opened is not None:
            self._opened[1].close()
            self._opened = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
