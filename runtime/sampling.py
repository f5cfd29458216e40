"""The DDPM-Würstchen sampler and its loop.

Follows diffusers' DDPMWuerstchenScheduler operation for operation in float32: a last-bit difference in a
timestep is multiplied by 10,000 in the networks' timestep embedding, so the order of roundings matters.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..schemas.errors import UsageError

F32 = NDArray[np.float32]

COSINE_OFFSET = 0.008  # s of the cosine schedule (Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672)
ALPHA_BAR_LIMITS = (np.float32(0.0001), np.float32(0.9999))

Predict = Callable[[F32, np.float32], F32]  # latents x_t and timestep ratio t -> predicted noise
Draw = Callable[[], F32]  # standard normal noise of the latents' shape


@dataclass(frozen=True)
class Step:
    """The state after one step: latents (B, c, h, w) float32 at `timestep_ratio`, 0 at the end."""

    index: int
    steps: int
    timestep_ratio: float
    latents: F32


def timesteps(steps: int) -> F32:
    """`steps` + 1 ratios from 1 to 0, bit for bit torch.linspace(1, 0, steps + 1) in float32.

    Raises UsageError for less than one step."""
    if steps < 1:
        raise UsageError(f"{steps} steps: expected at least 1")
    # torch counts up from the start in the first half and down from the end in the second.
    step = np.float32(-1) / np.float32(steps)
    count = np.arange(steps + 1, dtype=np.float32)
    first = _fused(step, count, 1.0)
    second = _fused(-step, np.float32(steps) - count, 0.0)
    return np.where(count < (steps + 1) // 2, first, second).astype(np.float32)


def alpha_bar(t: F32 | np.float32) -> F32:
    """Share of the signal's variance left at ratio `t`: cos²((t+s)/(1+s)·π/2) / cos²(s/(1+s)·π/2), clamped."""
    s, one, half, pi = (np.float32(value) for value in (COSINE_OFFSET, 1, 0.5, math.pi))
    start = np.cos(s / (one + s) * pi * half) ** 2
    bar: F32 = np.clip(np.cos((t + s) / (one + s) * pi * half) ** 2 / start, *ALPHA_BAR_LIMITS)
    return bar


def ddpm_step(x_t: F32, eps: F32, z: F32, t: np.float32, t_prev: np.float32) -> F32:
    """x at `t_prev` from x at `t`, the predicted noise `eps` and fresh noise `z` (all of one shape, float32).

    DDPM posterior: mean (x - (1-α)·ε/√(1-ᾱ)) / √α, variance (1-α)(1-ᾱ_prev)/(1-ᾱ), no noise at the end."""
    one = np.float32(1)
    bar, bar_prev = alpha_bar(t), alpha_bar(t_prev)
    alpha = bar / bar_prev
    mean: F32 = np.sqrt(one / alpha) * (x_t - (one - alpha) * eps / np.sqrt(one - bar))
    if t_prev == 0:
        return mean
    deviation: F32 = np.sqrt((one - alpha) * (one - bar_prev) / (one - bar))
    return mean + deviation * z


def guided(prediction: F32, guidance: float) -> F32:
    """Classifier-free guidance: lerp from the second half of the batch (unconditional) to the first (conditional)."""
    cond, uncond = np.split(prediction, 2)
    weight = np.float32(guidance)
    if abs(weight) < 0.5:  # the two forms of torch.lerp
        return uncond + weight * (cond - uncond)
    return cond - (cond - uncond) * (np.float32(1) - weight)


def sample(predict: Predict, latents: F32, ratios: F32, draw: Draw) -> Iterator[Step]:
    """Denoise `latents` along `ratios`, one Step at a time; stop iterating to cancel.

    Noise is drawn at every step, the last included where it is not used, as diffusers does: a generator that
    goes on to the next stage then stands where theirs does."""
    steps = len(ratios) - 1
    for index in range(steps):
        t, t_prev = ratios[index], ratios[index + 1]
        latents = ddpm_step(latents, predict(latents, t), draw(), t, t_prev)
        yield Step(index, steps, float(t_prev), latents)


def _fused(a: np.float32, b: F32, c: float) -> F32:
    """a·b + c with one rounding, as torch's vectorised kernel computes it."""
    return (np.float64(a) * b + c).astype(np.float32)
