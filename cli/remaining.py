"""Estimates how long a run of `generate` still takes: prior, decoder and vqgan of all its images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING

from ..schemas.stages import Stage

if TYPE_CHECKING:
    from ..schemas.manifest import Manifest
    from ..schemas.settings import Settings

SAMPLED = (Stage.PRIOR, Stage.DECODER, Stage.VQGAN)  # in the order they run


@dataclass(frozen=True)
class StagePass:
    """The part of one stage in one group of images: its steps, and the multiply-adds of a step."""

    steps: int
    work: float


Passes = Mapping[Stage, StagePass]  # one group of images that are generated together


@dataclass
class _Pace:
    """The seconds that a stage has taken: those of the first step of each pass, loading included, and of the others."""

    first: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)
    work: float = 0.0  # multiply-adds of a step

    @property
    def step(self) -> float | None:
        """Seconds of a step without loading; an upper bound while only first steps were seen."""
        found = self.later or self.first
        return sum(found) / len(found) if found else None

    def of_pass(self, steps: int) -> float:
        """Seconds of a whole pass. Only for a stage that has run."""
        assert self.step is not None
        return (sum(self.first) / len(self.first) if self.first else self.step) + (steps - 1) * self.step


class Remaining:
    """The seconds that a run still takes, from the seconds that its steps have taken.

    A stage that has not run yet is predicted from its arithmetic, at the speed of the stage that ran last."""

    def __init__(self, groups: Sequence[Passes]) -> None:
        self._groups = list(groups)
        self._paces = {stage: _Pace() for stage in SAMPLED}
        self._last = monotonic()
        self._at: tuple[int, Stage, int] = (0, Stage.PRIOR, 0)  # the group, its stage, the steps done

    def step(self, stage: Stage, done: int, now: float | None = None) -> None:
        """Note that step `done` (from 1) of `stage` has ended at `now`, in seconds of the monotonic clock."""
        now = monotonic() if now is None else now
        group = self._at[0] + (SAMPLED.index(stage) < SAMPLED.index(self._at[1]))
        pace = self._paces[stage]
        (pace.first if done == 1 else pace.later).append(now - self._last)
        pace.work = self._groups[min(group, len(self._groups) - 1)][stage].work
        self._at, self._last = (group, stage, done), now

    def decoded(self, now: float | None = None) -> None:
        """Note that an image is done; the first one of a group ends the vqgan's pass."""
        if self._at[1] is not Stage.VQGAN:
            self.step(Stage.VQGAN, 1, now)

    def seconds(self, now: float | None = None) -> float | None:
        """Seconds to the end of the run; None before the first step has ended."""
        number, stage, done = self._at
        if self._paces[stage].step is None:
            return None
        total = 0.0
        for index, passes in enumerate(self._groups[number:]):
            for each, planned in passes.items():
                begun = SAMPLED.index(each) - SAMPLED.index(stage) if index == 0 else 1
                if begun == 0:
                    total += (planned.steps - done) * self._per_step(each, planned)
                elif begun > 0:
                    total += self._per_pass(each, planned)
        since = (monotonic() if now is None else now) - self._last
        return max(0.0, total - since)

    def _per_step(self, stage: Stage, planned: StagePass) -> float:
        pace = self._paces[stage]
        if pace.step is not None and pace.work:
            return pace.step * planned.work / pace.work
        known = self._paces[self._at[1]]
        return (known.step or 0.0) * planned.work / known.work if known.work else 0.0

    def _per_pass(self, stage: Stage, planned: StagePass) -> float:
        pace = self._paces[stage]
        if pace.step is None or not pace.work:
            return planned.steps * self._per_step(stage, planned)
        return pace.of_pass(planned.steps) * planned.work / pace.work


def passes_of(manifest: "Manifest", settings: "Settings", images: int) -> Passes:
    """The steps of each stage, and their arithmetic, for `images` images that are generated together."""
    from ..schemas.config_json import from_json
    from ..schemas.operations import multiply_adds
    from ..schemas.sizes import latent_sizes

    sizes = latent_sizes(settings.height, settings.width, settings.size_policy)
    found = {}
    for stage, sampling, (height, width) in (
        (Stage.PRIOR, settings.prior, sizes.prior),
        (Stage.DECODER, settings.decoder, sizes.decoder),
        (Stage.VQGAN, None, sizes.decoder),
    ):
        if stage in manifest.stages:
            rows = images * (2 if sampling and sampling.guides else 1)
            dims = {"batch": rows, "height": height, "width": width, "tokens": 77, "images": 1}
            steps = (len(sampling.timesteps) - 1 if sampling.timesteps else sampling.steps) if sampling else 1
            found[stage] = StagePass(steps, multiply_adds(from_json(stage, manifest.stages[stage].config), dims))
    return found
