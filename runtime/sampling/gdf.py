"""Stability's sampler, the DDPM of their "gdf" (generalised diffusion framework).

The same cosine schedule as DDPM-Würstchen's, told in log signal-to-noise ratios; it may be shifted to another
resolution, its guidance keeps the deviation of the conditional prediction, and noise is added at the last step too.
Formulas follow StableCascade/gdf (schedulers.py, noise_conditions.py, samplers.py) in float32 and in their order.
"""

import math
from dataclasses import dataclass

import numpy as np

from .ddpm import COSINE_OFFSET, F32, Schedule, guided

VARIANCE_LIMITS = (np.float32(0.0001), np.float32(0.9999))
ONE, HALF_PI = np.float32(1), np.float32(math.pi) * np.float32(0.5)
OFFSET = np.float32(COSINE_OFFSET)
MIN_VARIANCE = np.cos(OFFSET / (ONE + OFFSET) * HALF_PI) ** 2


@dataclass(frozen=True)
class Gdf:
    """The sampler on given points: log signal-to-noise ratios, and the timestep ratios that belong to them."""

    log_snr: F32  # (steps + 1,)
    ratios: F32  # (steps + 1,)
    rescale: float  # 0: plain guidance; 1: wholly the deviation of the conditional prediction
    first: np.float32  # log signal-to-noise ratio of the first point where nothing is shifted

    def diffuse(self, x_0: F32, noise: F32, index: int) -> F32:
        return _diffused(x_0, noise, self.log_snr[index])

    def begin(self, x_0: F32, noise: F32) -> F32:
        """Stability's notebooks shift the sampling, not the noise that is put on a picture before it: they call
        GDF.diffuse without a shift."""
        return _diffused(x_0, noise, self.first)

    def predicted(self, x_t: F32, eps: F32, index: int) -> F32:
        a, b = _scales(self.log_snr[index])
        return np.asarray((x_t - eps * b) / a, np.float32)

    def step(self, x_t: F32, eps: F32, z: F32, index: int) -> F32:
        (a, b), (a_prev, b_prev) = (_scales(self.log_snr[point]) for point in (index, index + 1))
        sigma = np.sqrt(b_prev**2 / b**2) * np.sqrt(ONE - a**2 / a_prev**2)
        x_prev: F32 = a_prev * self.predicted(x_t, eps, index) + np.sqrt(b_prev**2 - sigma**2) * eps + sigma * z
        return x_prev

    def guide(self, prediction: F32, guidance: float) -> F32:
        """The deviations are those of all samples together, as in the original."""
        found = guided(prediction, guidance)
        if not self.rescale:
            return found
        share, cond = np.float32(self.rescale), prediction[: len(found)]
        factor = np.float32(np.std(cond, ddof=1) / (np.std(found, ddof=1) + np.float32(1e-9)))
        rescaled: F32 = share * (found * factor) + found * (ONE - share)
        return rescaled


def gdf_schedule(points: F32, shift: float = 1.0, rescale: float = 0.0) -> Schedule:
    """The sampler on `points` (steps + 1,), ratios that fall from at most 1 to at least 0.

    `shift` s moves the log signal-to-noise ratio by 2·ln(1/s), within the limits it has without."""
    plain = log_snr = _log_snr(points)
    if shift != 1:
        limits = _log_snr(np.array([1, 0], np.float32))
        log_snr = np.clip(log_snr + np.float32(2 * math.log(1 / shift)), *limits)
    return Gdf(log_snr, _ratios(log_snr), rescale, plain[0])


def _log_snr(t: F32) -> F32:
    angle = np.clip(np.cos((OFFSET + t) / (ONE + OFFSET) * HALF_PI), 0, 1)
    variance = np.clip(angle**2 / MIN_VARIANCE, *VARIANCE_LIMITS)
    found: F32 = np.log(variance / (ONE - variance))
    return found


def _ratios(log_snr: F32) -> F32:
    """The inverse of the cosine schedule, clamped to 0..1; what the networks are told."""
    t = np.arccos(np.sqrt(_sigmoid(log_snr) * MIN_VARIANCE)) / HALF_PI * (ONE + OFFSET) - OFFSET
    found: F32 = np.clip(t, 0, 1).astype(np.float32)
    return found


def _diffused(x_0: F32, noise: F32, log_snr: np.float32) -> F32:
    a, b = _scales(log_snr)
    return np.asarray(a * x_0 + b * noise, np.float32)


def _scales(log_snr: np.float32) -> tuple[np.float32, np.float32]:
    """Of signal and noise, whose squares sum to one."""
    variance = _sigmoid(log_snr)
    return np.float32(np.sqrt(variance)), np.float32(np.sqrt(ONE - variance))


def _sigmoid(value: F32 | np.float32) -> F32:
    found: F32 = ONE / (ONE + np.exp(-value))
    return found
