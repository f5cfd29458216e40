"""The samplers by name, and how one stage is sampled."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from ...schemas.errors import UsageError
from ...schemas.limits import MAX_STEPS
from ...schemas.settings import Sampler, Settings
from .ddpm import F32, Schedule, Wuerstchen, custom_timesteps, timesteps
from .gdf import gdf_schedule


class SamplingOptions(TypedDict, total=False):
    """What `Cascade.prior` and `Cascade.decode` take to say how to sample; the fields of Sampling."""

    steps: int
    guidance: float
    sampler: Sampler | str
    shift: float
    rescale: float
    timesteps: Sequence[float]


@dataclass(frozen=True)
class Sampling:
    """How one stage is sampled. Guidance above 1 is classifier-free; `shift` and `rescale` are gdf's alone. The
    points in `timesteps`, one more than there are steps, take the place of `steps`."""

    steps: int
    guidance: float
    sampler: Sampler | str = Sampler.DDPM_WUERSTCHEN
    shift: float = 1.0
    rescale: float = 0.0
    timesteps: Sequence[float] = ()

    @property
    def guides(self) -> bool:
        return self.guidance > 1

    def schedule(self, strength: float = 1.0) -> Schedule:
        """From ratio `strength` down; of the steps, that share of them is made, at least one, as Stability does.

        Raises UsageError for a sampler, a number or a list that cannot be."""
        if not 0 < strength <= 1:
            raise UsageError(f"strength {strength:g}: expected more than 0, at most 1")
        if self.sampler not in SCHEDULES:
            raise UsageError(f"sampler {self.sampler!r}: expected {' or '.join(SCHEDULES)}")
        if self.steps > MAX_STEPS or len(self.timesteps) > MAX_STEPS + 1:
            raise UsageError(f"more than {MAX_STEPS} steps: expected at most {MAX_STEPS}")
        if self.timesteps:
            points = _below(custom_timesteps(self.timesteps), strength)
        else:
            points = timesteps(max(1, int(self.steps * strength)) if self.steps > 0 else self.steps, strength)
        return SCHEDULES[Sampler(self.sampler)](points, self)


def check_schedules(settings: Settings, *, varies: bool) -> None:
    """Raise UsageError for a sampler, a number of steps, a shift or a list that either stage would refuse; where a
    picture is varied, also for its strength."""
    of, sampler, rescale = settings, settings.sampler, settings.rescale
    prior = Sampling(of.prior_steps, of.prior_guidance, sampler, of.prior_shift, rescale, of.prior_timesteps)
    decoder = Sampling(of.decoder_steps, of.decoder_guidance, sampler, of.decoder_shift, rescale, of.decoder_timesteps)
    prior.schedule(of.strength if varies else 1.0)
    decoder.schedule()


def _below(points: F32, strength: float) -> F32:
    """The points from ratio `strength` on, that one in place of what lies above it."""
    if strength == 1:
        return points
    rest = points[points < np.float32(strength)]
    if not len(rest):
        raise UsageError(f"strength {strength:g}: all timesteps lie above it, down to {points[-1]:g}; raise it")
    return np.append(np.float32(strength), rest)


def _wuerstchen(points: F32, sampling: Sampling) -> Schedule:
    if sampling.shift != 1 or sampling.rescale:
        raise UsageError(f"shift and rescale: {Sampler.DDPM_WUERSTCHEN} has neither; take sampler {Sampler.GDF}")
    return Wuerstchen(points)


def _gdf(points: F32, sampling: Sampling) -> Schedule:
    if not sampling.shift > 0:
        raise UsageError(f"shift {sampling.shift:g}: expected more than 0")
    return gdf_schedule(points, sampling.shift, sampling.rescale)


SCHEDULES: Mapping[Sampler, Callable[[F32, Sampling], Schedule]] = {
    Sampler.DDPM_WUERSTCHEN: _wuerstchen,
    Sampler.GDF: _gdf,
}
