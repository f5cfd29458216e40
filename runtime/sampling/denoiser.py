"""A sampled stage with its conditions, as a function of latents and timestep ratio alone."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, pairwise

import numpy as np

from ...schemas.stages import Stage
from ..engines.base import Engine, Run, Tensors
from ..memory.residency import Residency
from .ddpm import F32, Predict, Schedule
from .hoisting import CONDITIONING, STEP, HoistedStage, is_hoisted, prepare

Check = Callable[[F32, str], None]  # rows of a batch, and when they were computed


@contextmanager
def denoiser(
    engine: Engine,
    residency: Residency,
    stage: Stage,
    latents: F32,
    conditions: Tensors,
    schedule: Schedule,
    *,
    guidance: float | None,
    rows: int,
    check: Check = lambda prediction, where: None,
) -> Iterator[Predict]:
    """The stage, in memory and with `conditions` bound for as long as the context lasts.

    With `guidance` the conditions are a batch [conditional, unconditional], twice that of `latents`. `rows` bounds the
    batch that goes through the network at once. `check` is given what the network predicts in each step, and raises
    where that is no prediction."""
    steps, made = len(schedule.ratios) - 1, count(1)
    doubled = np.concatenate([latents, latents]) if guidance is not None else latents
    parts = _parts(len(doubled), rows)
    with _bound(engine, residency, stage, doubled, conditions, schedule.ratios[:-1], parts) as runs:

        def predict(x_t: F32, t: np.float32) -> F32:
            x_t = np.concatenate([x_t, x_t]) if guidance is not None else x_t
            ratio = np.full(len(x_t), t, np.float32)
            found = [
                run({"sample": x_t[part], "timestep_ratio": ratio[part]})["noise_pred"]
                for part, run in zip(parts, runs, strict=True)
            ]
            prediction = found[0] if len(found) == 1 else np.concatenate(found)
            check(prediction, f"step {next(made)} of {steps}")
            return prediction if guidance is None else schedule.guide(prediction, guidance)

        yield predict


@contextmanager
def _bound(
    engine: Engine,
    residency: Residency,
    stage: Stage,
    sample: F32,
    conditions: Tensors,
    ratios: F32,
    parts: Sequence[slice],
) -> Iterator[list[Run]]:
    """The stage for each part of the batch. Where the engine has it in two graphs, the first runs now, once for all
    of `ratios`."""
    each = [{name: value[part] for name, value in conditions.items()} for part in parts]
    if not is_hoisted(engine, stage):
        with residency.use(stage) as whole:
            yield [whole.bind(constants) for constants in each]
        return
    with residency.use(stage, CONDITIONING) as first:
        prepared = [
            prepare(first, stage, sample[part], constants, ratios) for part, constants in zip(parts, each, strict=True)
        ]
    with residency.use(stage, STEP) as step:
        yield [HoistedStage(step, each, ratios) for each in prepared]


def _parts(total: int, rows: int) -> list[slice]:
    """A batch of `total` in as few parts of at most `rows` as possible, of nearly equal size."""
    number = -(-total // rows)
    edges = [round(total * part / number) for part in range(number + 1)]
    return [slice(start, end) for start, end in pairwise(edges)]
