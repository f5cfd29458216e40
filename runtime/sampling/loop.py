"""The sampling loop: from noise, or from a picture's latents, to the latents of one stage."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from ...schemas.errors import UsageError
from ...schemas.messages import with_shapes
from ...schemas.settings import Sampling
from ...schemas.sizes import ROW_AREA
from ...schemas.stages import Stage
from ..engines.protocol import F32, Tensors
from ..networks import Networks, require_finite
from .denoiser import Predict, denoiser
from .noise import Noise
from .samplers import Schedule, make_schedule

Show = Callable[[F32], list[Image.Image]]  # latents (B, c, h, w) to B small images


def _no_show(latents: F32) -> list[Image.Image]:
    raise UsageError("no preview here: sample through Cascade.prior or Cascade.decode")


@dataclass
class Step:
    """The state of the sampling after one step. A caller may replace `latents`; sampling goes on with the new ones."""

    index: int  # from 0
    steps: int
    timestep_ratio: float  # of `latents`, 0 at the end
    latents: F32  # (B, c, h, w)
    predicted: F32  # (B, c, h, w): the noiseless latents as the network predicts them at this step
    _show: Show = field(default=_no_show, repr=False)

    __repr__ = with_shapes

    def preview(self) -> list[Image.Image]:
        """`predicted` as B images, computed when asked for: by the previewer for the prior, else by the vqgan.

        Raises UsageError when the bundle has no previewer."""
        return self._show(self.predicted)


OnStep = Callable[[Stage, Step], object]


@dataclass(frozen=True)
class Start:
    """Noiseless latents to start from, and the timestep ratio `strength` where sampling starts.

    `mask` is 1 where latents are sampled anew and 0 where they are kept."""

    latents: F32  # (1 or B, c, h, w)
    strength: float = 1.0
    mask: F32 | None = None  # (1 or B, 1, h, w)

    def for_shape(self, shape: tuple[int, ...]) -> "Start":
        """Latents and mask repeated for a whole batch. Raises UsageError when their sizes differ from `shape`."""
        latents = _broadcast("latents to start from", self.latents, shape)
        mask = None if self.mask is None else _broadcast("mask", self.mask, (shape[0], 1, *shape[2:]))
        return Start(latents, self.strength, mask)


@dataclass(frozen=True)
class StageConditions:
    """The conditions of one stage by input port, each (B, ...), and the negative ones, which guidance leads away from.

    Without guidance the negative conditions are not used."""

    positive: Tensors
    negative: Tensors


@dataclass(frozen=True)
class StageSampling:
    """How to sample one stage for one batch."""

    shape: tuple[int, ...]  # (B, c, h, w) of the latents
    sampling: Sampling
    noise: Noise
    latents: F32 | None = None  # in place of the first noise
    start: Start | None = None
    rows: int | None = None  # most rows of the batch that go through the network at once; guidance doubles the batch


def sample_stage(
    networks: Networks, stage: Stage, conditions: StageConditions, batch: StageSampling, show: Show
) -> Iterator[Step]:
    """Sample one stage, a Step at a time; the stage stays in memory until the last one.

    Raises UsageError for latents of the wrong shape and for NaN or infinity in the arguments. Raises UnsoundError when
    the network predicts NaN or infinity."""
    shape, sampling = batch.shape, batch.sampling
    start = batch.start and batch.start.for_shape(shape)
    schedule = make_schedule(sampling, start.strength if start else 1.0)
    first = batch.noise.draw(shape) if batch.latents is None else batch.latents.astype(np.float32, copy=False)
    if first.shape != shape:
        raise UsageError(f"{stage} latents: expected shape {list(shape)}, found {list(first.shape)}")
    begun = {"start": start.latents} if start else {}
    inputs = conditions.positive
    require_finite(f"the {stage}'s", {"latents": first, **begun, **inputs})
    if sampling.guides:  # batch [conditional, unconditional]
        inputs = {name: np.concatenate([value, conditions.negative[name]]) for name, value in inputs.items()}
    rows = batch.rows or max(1, ROW_AREA[stage] // (shape[2] * shape[3]))
    guidance = sampling.guidance if sampling.guides else None
    with denoiser(networks, stage, first, inputs, schedule=schedule, guidance=guidance, rows=rows) as predict:
        x_t = first if start is None else schedule.begin(start.latents, first)
        steps = sample(predict, x_t, schedule, lambda: batch.noise.draw(shape), show)
        yield from steps if start is None or start.mask is None else keep_outside(steps, start, first, schedule)


def sample(
    predict: Predict, latents: F32, schedule: Schedule, draw: Callable[[], F32], show: Show = _no_show
) -> Iterator[Step]:
    """Denoise `latents` (B, c, h, w) along `schedule`, one Step at a time; stop iterating to cancel.

    `draw` returns standard normal noise of the latents' shape. It is called at the last step too, where diffusers draws
    noise without using it. The next stage then finds the generator in the same state as in diffusers.

    Raises UsageError when a step comes back with latents of another shape."""
    steps = len(schedule.ratios) - 1
    for index in range(steps):
        eps = predict(latents, schedule.ratios[index])
        predicted = schedule.predicted(latents, eps, index)
        after = schedule.step(latents, eps, draw(), index)
        step = Step(index, steps, float(schedule.ratios[index + 1]), after, predicted, _show=show)
        yield step
        if step.latents.shape != after.shape:
            raise UsageError(
                f"step {index + 1}: expected latents of shape {list(after.shape)} back, "
                f"found {list(step.latents.shape)}"
            )
        latents = step.latents.astype(np.float32, copy=False)


def keep_outside(steps: Iterator[Step], start: Start, noise: F32, schedule: Schedule) -> Iterator[Step]:
    """After every step put back the latents of `start` where its mask is 0, with the noise of that step.

    This is RePaint without resampling (Lugmayr et al. 2022, https://arxiv.org/abs/2201.09865)."""
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
