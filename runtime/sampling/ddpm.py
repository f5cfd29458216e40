"""The sampling loop, and the DDPM-Würstchen sampler.

Follows diffusers' DDPMWuerstchenScheduler operation for operation in float32: a last-bit difference in a
timestep is multiplied by 10,000 in the networks' timestep embedding, so the order of roundings matters.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...schemas.errors import UsageError

F32 = NDArray[np.float32]

COSINE_OFFSET = 0.008  # s of the cosine schedule (Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672)
ALPHA_BAR_LIMITS = (np.float32(0.0001), np.float32(0.9999))

Predict = Callable[[F32, np.float32], F32]  # latents x_t and timestep ratio t -> predicted noise
Draw = Callable[[], F32]  # standard normal noise of the latents' shape
Show = Callable[[F32], list[Image.Image]]  # latents to small pictures


class Schedule(Protocol):
    """A sampler with its points in time; step `index` leads from point `index` to the next."""

    @property
    def ratios(self) -> F32:
        """(steps + 1,): what the network is told at each point."""

    def diffuse(self, x_0: F32, noise: F32, index: int) -> F32:
        """Noiseless latents as they would be at point `index`."""

    def begin(self, x_0: F32, noise: F32) -> F32:
        """Noiseless latents as sampling that starts from them begins, at point 0."""

    def predicted(self, x_t: F32, eps: F32, index: int) -> F32:
        """The noiseless latents that follow from noise `eps` predicted at point `index`."""

    def step(self, x_t: F32, eps: F32, z: F32, index: int) -> F32:
        """Latents at point `index` + 1, from those at `index`, the predicted noise and fresh noise `z`."""

    def guide(self, prediction: F32, guidance: float) -> F32:
        """Classifier-free guidance of a batch [conditional, unconditional]; half as many come out."""


def _no_show(latents: F32) -> list[Image.Image]:
    raise UsageError("no preview here: sample through Cascade.prior or Cascade.decode")


@dataclass
class Step:
    """The state after one step. Whoever is given it may put other `latents` in place: sampling goes on with these."""

    index: int
    steps: int
    timestep_ratio: float  # where `latents` are, 0 at the end
    latents: F32  # (B, c, h, w)
    predicted: F32  # (B, c, h, w): the noiseless latents as the network sees them now
    _show: Show = field(default=_no_show, repr=False)

    def preview(self) -> list[Image.Image]:
        """`predicted` as pictures, computed when asked for: by the previewer for stage C, by the vqgan for stage B.

        Raises UsageError when the bundle has no previewer."""
        return self._show(self.predicted)


def sample(predict: Predict, latents: F32, schedule: Schedule, draw: Draw, show: Show = _no_show) -> Iterator[Step]:
    """Denoise `latents` along `schedule`, one Step at a time; stop iterating to cancel.

    Noise is drawn at every step, the last included where diffusers' sampler does not use it, as diffusers does: a
    generator that goes on to the next stage then stands where theirs does. Raises UsageError when a step is given
    back with latents of another shape."""
    steps = len(schedule.ratios) - 1
    for index in range(steps):
        eps = predict(latents, schedule.ratios[index])
        predicted = schedule.predicted(latents, eps, index)
        after = schedule.step(latents, eps, draw(), index)
        step = Step(index, steps, float(schedule.ratios[index + 1]), after, predicted, show)
        yield step
        if step.latents.shape != after.shape:
            raise UsageError(
                f"step {index + 1}: expected latents of shape {list(after.shape)} back, "
                f"found {list(step.latents.shape)}"
            )
        latents = step.latents.astype(np.float32, copy=False)


@dataclass(frozen=True)
class Wuerstchen:
    """diffusers' DDPMWuerstchenScheduler on given points in time."""

    ratios: F32

    def diffuse(self, x_0: F32, noise: F32, index: int) -> F32:
        bar = alpha_bar(self.ratios[index])
        x_t: F32 = np.sqrt(bar) * x_0 + np.sqrt(np.float32(1) - bar) * noise
        return x_t

    def begin(self, x_0: F32, noise: F32) -> F32:
        return self.diffuse(x_0, noise, 0)

    def predicted(self, x_t: F32, eps: F32, index: int) -> F32:
        bar = alpha_bar(self.ratios[index])
        x_0: F32 = (x_t - np.sqrt(np.float32(1) - bar) * eps) / np.sqrt(bar)
        return x_0

    def step(self, x_t: F32, eps: F32, z: F32, index: int) -> F32:
        return ddpm_step(x_t, eps, z, self.ratios[index], self.ratios[index + 1])

    def guide(self, prediction: F32, guidance: float) -> F32:
        return guided(prediction, guidance)


def timesteps(steps: int, start: float = 1.0) -> F32:
    """`steps` + 1 ratios from `start` to 0, bit for bit torch.linspace(start, 0, steps + 1) in float32.

    Raises UsageError for less than one step."""
    if steps < 1:
        raise UsageError(f"{steps} steps: expected at least 1")
    # torch counts up from the start in the first half and down from the end in the second.
    step = np.float32(-start) / np.float32(steps)
    count = np.arange(steps + 1, dtype=np.float32)
    first = _fused(step, count, float(np.float32(start)))
    second = _fused(-step, np.float32(steps) - count, 0.0)
    return np.where(count < (steps + 1) // 2, first, second).astype(np.float32)


def custom_timesteps(ratios: Sequence[float]) -> F32:
    """A list of one's own, checked. Raises UsageError unless it falls from at most 1 to at least 0."""
    found = np.array(ratios, np.float32)
    if found.ndim != 1 or len(found) < 2 or not (np.all(np.diff(found) < 0) and found[0] <= 1 and found[-1] >= 0):
        raise UsageError(
            f"timesteps {', '.join(f'{ratio:g}' for ratio in ratios)}: expected two or more that fall, "
            "from at most 1 to at least 0 (1, 0.5, 0 are two steps)"
        )
    return found


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


def _fused(a: np.float32, b: F32, c: float) -> F32:
    """a·b + c with one rounding, as torch's vectorised kernel computes it."""
    return (np.float64(a) * b + c).astype(np.float32)
