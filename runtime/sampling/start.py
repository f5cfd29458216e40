"""Sampling that starts from a picture: variations of it, or new content inside a mask."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ...schemas.errors import UsageError
from .ddpm import F32, Schedule, Step


@dataclass(frozen=True)
class Start:
    """Noiseless latents to start from, and how far from them: `strength` is the timestep ratio where sampling starts.
    `mask` is 1 where something new is to be drawn and 0 where the latents are to stay."""

    latents: F32  # (1 or B, c, h, w)
    strength: float = 1.0
    mask: F32 | None = None  # (1 or B, 1, h, w)

    def for_shape(self, shape: tuple[int, ...]) -> "Start":
        """With latents and mask for a whole batch. Raises UsageError when they do not have its size."""
        latents = _broadcast("latents to start from", self.latents, shape)
        mask = None if self.mask is None else _broadcast("mask", self.mask, (shape[0], 1, *shape[2:]))
        return Start(latents, self.strength, mask)


def keep_outside(steps: Iterator[Step], start: Start, noise: F32, schedule: Schedule) -> Iterator[Step]:
    """After every step put the latents to start from back where the mask is 0, as noisy as the rest is by then
    (RePaint without resampling: Lugmayr et al. 2022, https://arxiv.org/abs/2201.09865)."""
    assert start.mask is not None
    for step in steps:
        last = step.index + 1 == step.steps
        known = start.latents if last else schedule.diffuse(start.latents, noise, step.index + 1)
        step.latents = start.mask * step.latents + (np.float32(1) - start.mask) * known
        yield step


def _broadcast(what: str, array: F32, shape: tuple[int, ...]) -> F32:
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        raise UsageError(f"{what}: expected shape {list(shape)}, found {list(array.shape)}") from None
