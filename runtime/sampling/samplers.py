"""The samplers: their schedules, their steps and their guidance.

diffusers' DDPMWuerstchenScheduler is followed operation for operation in float32. The networks' timestep embedding
multiplies a last-bit difference in a timestep by 10,000, so the order of roundings matters.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...schemas.errors import UsageError
from ...schemas.limits import MAX_STEPS
from ...schemas.settings import Sampler, Sampling, Settings
from ..engines.protocol import F32

VARIANCE_LIMITS = (np.float32(0.0001), np.float32(0.9999))  # of ᾱ, in both samplers
ONE, HALF_PI = np.float32(1), np.float32(math.pi) * np.float32(0.5)
OFFSET = np.float32(0.008)  # s of the cosine schedule (Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672)
MIN_VARIANCE = np.cos(OFFSET / (ONE + OFFSET) * HALF_PI) ** 2


@dataclass(frozen=True)
class Schedule(ABC):
    """A sampler on given points in time. Step `index` leads from point `index` to the next; all arrays are float32."""

    ratios: F32  # (steps + 1,): the timestep ratio at each point, as the network is given it

    @abstractmethod
    def scales(self, index: int) -> tuple[np.float32, np.float32]:
        """The factors of signal and noise at point `index`; their squares sum to one."""

    @abstractmethod
    def step(self, x_t: F32, eps: F32, z: F32, index: int) -> F32:
        """Latents at point `index` + 1, from those at `index`, the predicted noise and fresh noise `z`."""

    def diffuse(self, x_0: F32, noise: F32, index: int) -> F32:
        """Add `noise` to noiseless latents, at the noise level of point `index`."""
        return _diffused(x_0, noise, self.scales(index))

    def begin(self, x_0: F32, noise: F32) -> F32:
        """Add `noise` to noiseless latents from which sampling starts, at point 0."""
        return self.diffuse(x_0, noise, 0)

    def predicted(self, x_t: F32, eps: F32, index: int) -> F32:
        """The noiseless latents that follow from the noise `eps` predicted at point `index`."""
        signal, noise = self.scales(index)
        return np.asarray((x_t - noise * eps) / signal, np.float32)

    def guide(self, prediction: F32, guidance: float) -> F32:
        """Apply classifier-free guidance to a batch [conditional, unconditional]; half as many rows come out."""
        return guided(prediction, guidance)


def make_schedule(sampling: Sampling, strength: float = 1.0) -> Schedule:
    """The schedule of one stage, from timestep ratio `strength` down.

    A strength below 1 takes that share of the steps, at least one, as Stability does. Raises UsageError for an unknown
    sampler, and for a number of steps or a list of timesteps out of range."""
    if not 0 < strength <= 1:
        raise UsageError(f"strength {strength:g}: expected more than 0, at most 1")
    if sampling.sampler not in list(Sampler):
        raise UsageError(f"sampler {sampling.sampler!r}: expected {' or '.join(Sampler)}")
    if sampling.steps > MAX_STEPS or len(sampling.timesteps) > MAX_STEPS + 1:
        raise UsageError(f"more than {MAX_STEPS} steps: expected at most {MAX_STEPS}")
    if sampling.timesteps:
        points = _below(custom_timesteps(sampling.timesteps), strength)
    else:
        points = timesteps(max(1, int(sampling.steps * strength)) if sampling.steps > 0 else sampling.steps, strength)
    if sampling.sampler == Sampler.GDF:
        return gdf_schedule(points, sampling.shift, sampling.rescale)
    if sampling.shift != 1 or sampling.rescale:
        raise UsageError(f'shift and rescale: {Sampler.DDPM_WUERSTCHEN} has neither; take sampler="{Sampler.GDF}"')
    return Wuerstchen(points)


def check_schedules(settings: Settings, *, varies: bool) -> None:
    """Raise UsageError for a sampler, number of steps, shift or list of timesteps that either stage would refuse.

    `varies` says that there is an initial picture; the strength is then checked too."""
    make_schedule(settings.prior, settings.strength if varies else 1.0)
    make_schedule(settings.decoder)


def timesteps(steps: int, start: float = 1.0) -> F32:
    """`steps` + 1 ratios from `start` to 0, bit for bit torch.linspace(start, 0, steps + 1) in float32.

    Raises UsageError for fewer than one step."""
    if steps < 1:
        raise UsageError(f"{steps} steps: expected at least 1")
    # torch counts up from the start in the first half and down from the end in the second.
    step = np.float32(-start) / np.float32(steps)
    count = np.arange(steps + 1, dtype=np.float32)
    first = _fused(step, count, float(np.float32(start)))
    second = _fused(-step, np.float32(steps) - count, 0.0)
    return np.where(count < (steps + 1) // 2, first, second).astype(np.float32)


def custom_timesteps(ratios: Sequence[float]) -> F32:
    """The user's own ratios as an array. Raises UsageError unless they fall from at most 1 to at least 0."""
    found = np.array(ratios, np.float32)
    if found.ndim != 1 or len(found) < 2 or not (np.all(np.diff(found) < 0) and found[0] <= 1 and found[-1] >= 0):
        raise UsageError(
            f"timesteps {', '.join(f'{ratio:g}' for ratio in ratios)}: expected two or more that fall, "
            "from at most 1 to at least 0 (1, 0.5, 0 are two steps)"
        )
    return found


def _below(points: F32, strength: float) -> F32:
    """The points from ratio `strength` on; `strength` itself replaces all points above it."""
    if strength == 1:
        return points
    rest = points[points < np.float32(strength)]
    if not len(rest):
        raise UsageError(f"strength {strength:g}: all timesteps are above it, down to {points[-1]:g}; raise it")
    return np.append(np.float32(strength), rest)


def _fused(a: np.float32, b: F32, c: float) -> F32:
    """a·b + c with one rounding, as torch's vectorised kernel computes it."""
    return (np.float64(a) * b + c).astype(np.float32)


# diffusers' sampler


@dataclass(frozen=True)
class Wuerstchen(Schedule):
    """diffusers' DDPMWuerstchenScheduler on given timestep ratios (steps + 1,)."""

    def scales(self, index: int) -> tuple[np.float32, np.float32]:
        return _scales(alpha_bar(self.ratios[index]))

    def step(self, x_t: F32, eps: F32, z: F32, index: int) -> F32:
        return ddpm_step(x_t, eps, z, self.ratios[index], self.ratios[index + 1])


def alpha_bar(t: F32 | np.float32) -> F32:
    """ᾱ, the share of the signal's variance left at ratio `t`: cos²((t+s)/(1+s)·π/2) / cos²(s/(1+s)·π/2), clamped."""
    bar: F32 = np.clip(np.cos((t + OFFSET) / (ONE + OFFSET) * HALF_PI) ** 2 / MIN_VARIANCE, *VARIANCE_LIMITS)
    return bar


def ddpm_step(x_t: F32, eps: F32, z: F32, t: np.float32, t_prev: np.float32) -> F32:
    """x at ratio `t_prev` from x at ratio `t`, the predicted noise `eps` and fresh noise `z`, all of one shape.

    The DDPM posterior has the mean (x - (1-α)·ε/√(1-ᾱ)) / √α and the variance (1-α)(1-ᾱ_prev)/(1-ᾱ). The last step
    adds no noise."""
    bar, bar_prev = alpha_bar(t), alpha_bar(t_prev)
    alpha = bar / bar_prev
    mean: F32 = np.sqrt(ONE / alpha) * (x_t - (ONE - alpha) * eps / np.sqrt(ONE - bar))
    if t_prev == 0:
        return mean
    deviation: F32 = np.sqrt((ONE - alpha) * (ONE - bar_prev) / (ONE - bar))
    return mean + deviation * z


def guided(prediction: F32, guidance: float) -> F32:
    """Classifier-free guidance: lerp from the second half of the batch (unconditional) to the first (conditional)."""
    cond, uncond = np.split(prediction, 2)
    weight = np.float32(guidance)
    if abs(weight) < 0.5:  # the two forms of torch.lerp
        return uncond + weight * (cond - uncond)
    return cond - (cond - uncond) * (ONE - weight)


# Stability's sampler


@dataclass(frozen=True)
class Gdf(Schedule):
    """Stability's sampler, the DDPM of their "gdf" (generalised diffusion framework).

    It has the cosine schedule of DDPM-Würstchen, written in log signal-to-noise ratios, which may be shifted to another
    resolution. Its guidance keeps the deviation of the conditional prediction, and the last step adds noise too.
    Formulas follow StableCascade/gdf (schedulers.py, noise_conditions.py, samplers.py) in float32 and in their order.
    """

    log_snr: F32  # (steps + 1,)
    rescale: float  # from 0, plain guidance, to 1, the full deviation of the conditional prediction
    first: np.float32  # log signal-to-noise ratio of the first point, before any shift

    def scales(self, index: int) -> tuple[np.float32, np.float32]:
        return _scales(_sigmoid(self.log_snr[index]))

    def begin(self, x_0: F32, noise: F32) -> F32:
        """Stability's notebooks shift the sampling, but not the noise that a picture begins with: they call GDF.diffuse
        without a shift."""
        return _diffused(x_0, noise, _scales(_sigmoid(self.first)))

    def step(self, x_t: F32, eps: F32, z: F32, index: int) -> F32:
        (a, b), (a_prev, b_prev) = self.scales(index), self.scales(index + 1)
        sigma = np.sqrt(b_prev**2 / b**2) * np.sqrt(ONE - a**2 / a_prev**2)
        x_prev: F32 = a_prev * self.predicted(x_t, eps, index) + np.sqrt(b_prev**2 - sigma**2) * eps + sigma * z
        return x_prev

    def guide(self, prediction: F32, guidance: float) -> F32:
        """As in the original, one deviation is taken over all samples of the batch."""
        found = super().guide(prediction, guidance)
        if not self.rescale:
            return found
        share, cond = np.float32(self.rescale), prediction[: len(found)]
        factor = np.float32(np.std(cond, ddof=1) / (np.std(found, ddof=1) + np.float32(1e-9)))
        rescaled: F32 = share * (found * factor) + found * (ONE - share)
        return rescaled


def gdf_schedule(points: F32, shift: float = 1.0, rescale: float = 0.0) -> Schedule:
    """Stability's sampler on `points` (steps + 1,), ratios that fall from at most 1 to at least 0.

    A `shift` of s adds 2·ln(1/s) to the log signal-to-noise ratio and clips the sum to the unshifted limits. Raises
    UsageError for a shift that is not above 0."""
    if not shift > 0:
        raise UsageError(f"shift {shift:g}: expected more than 0")
    plain = log_snr = _log_snr(points)
    if shift != 1:
        limits = _log_snr(np.array([1, 0], np.float32))
        log_snr = np.clip(log_snr + np.float32(2 * math.log(1 / shift)), *limits)
    return Gdf(_ratios_of(log_snr), log_snr, rescale, plain[0])


def _log_snr(t: F32) -> F32:
    variance = alpha_bar(t)
    found: F32 = np.log(variance / (ONE - variance))
    return found


def _ratios_of(log_snr: F32) -> F32:
    """The timestep ratios, clamped to 0..1, at which the cosine schedule has these log signal-to-noise ratios."""
    t = np.arccos(np.sqrt(_sigmoid(log_snr) * MIN_VARIANCE)) / HALF_PI * (ONE + OFFSET) - OFFSET
    found: F32 = np.clip(t, 0, 1).astype(np.float32)
    return found


def _diffused(x_0: F32, noise: F32, scales: tuple[np.float32, np.float32]) -> F32:
    return np.asarray(scales[0] * x_0 + scales[1] * noise, np.float32)


def _scales(variance: F32 | np.float32) -> tuple[np.float32, np.float32]:
    """The factors of signal and noise where the signal has this share of the variance."""
    return np.float32(np.sqrt(variance)), np.float32(np.sqrt(ONE - variance))


def _sigmoid(value: F32 | np.float32) -> F32:
    found: F32 = ONE / (ONE + np.exp(-value))
    return found
