"""A sampled stage with its conditions bound: a function of latents and timestep ratio alone.

The engine has the stage as one graph or as two. With two graphs, the conditioning graph runs once for the whole
schedule and the step graph once for each step, see `schemas.hoisted`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...schemas.control import is_control
from ...schemas.hoisted import CONDITIONING, FASTER_IN_PARTS, MODULATION, RATIOS, STEP
from ...schemas.stages import Stage
from ..engines.protocol import F32, Engine, HostRunner, Run, StageRunner, Tensors
from ..networks import Networks
from .samplers import Schedule

Predict = Callable[[F32, np.float32], F32]  # latents x_t (B, c, h, w) and timestep ratio t to the predicted noise


@contextmanager
def denoiser(
    networks: Networks,
    stage: Stage,
    latents: F32,
    conditions: Tensors,
    *,
    schedule: Schedule,
    guidance: float | None,
    rows: int,
) -> Iterator[Predict]:
    """The noise prediction of `stage` under `conditions`; the stage stays in memory for as long as the context lasts.

    `latents` (B, c, h, w) give the size. With `guidance` the conditions are a batch [conditional, unconditional] of 2B
    rows. At most `rows` rows go through the network at once. Predicting raises UnsoundError for NaN or infinity."""
    images, steps, made = len(latents), len(schedule.ratios) - 1, count(1)
    doubled = np.concatenate([latents, latents]) if guidance is not None else latents
    parts = _parts(len(doubled), rows)
    inputs = [{name: value[part] for name, value in {"sample": doubled, **conditions}.items()} for part in parts]
    with _bound(networks, stage, inputs, schedule.ratios[:-1]) as runs:

        def predict(x_t: F32, t: np.float32) -> F32:
            x_t = np.concatenate([x_t, x_t]) if guidance is not None else x_t
            ratio = np.full(len(x_t), t, np.float32)
            with networks.timings.step(stage):
                found = [
                    run({"sample": x_t[part], "timestep_ratio": ratio[part]})["noise_pred"]
                    for part, run in zip(parts, runs, strict=True)
                ]
            prediction = found[0] if len(found) == 1 else np.concatenate(found)
            networks.require_sound(stage, prediction, f"step {next(made)} of {steps}", images=images)
            return prediction if guidance is None else schedule.guide(prediction, guidance)

        yield predict


@contextmanager
def _bound(networks: Networks, stage: Stage, inputs: Sequence[Tensors], ratios: F32) -> Iterator[list[Run]]:
    """The stage with the conditions of each part of the batch bound; `inputs` are the inputs of each part."""
    conditions = [{name: value for name, value in part.items() if name != "sample"} for part in inputs]
    if not is_hoisted(networks.engine, stage):
        with networks.load(stage) as whole:
            yield [whole.bind(constants) for constants in conditions]
        return
    with networks.load(stage, CONDITIONING) as first:
        prepared = [
            prepare(first, stage, part["sample"], constants, ratios)
            for part, constants in zip(inputs, conditions, strict=True)
        ]
    with networks.load(stage, STEP) as step:
        yield [HoistedStage(step, each, ratios) for each in prepared]


def _parts(total: int, rows: int) -> list[slice]:
    """Cut a batch of `total` rows into as few parts of at most `rows` rows as possible, of nearly equal size."""
    number = -(-total // rows)
    edges = [round(total * part / number) for part in range(number + 1)]
    return [slice(start, end) for start, end in pairwise(edges)]


class HoistedStage(HostRunner):
    """A stage in two graphs whose conditioning graph has run: it takes `sample` and `timestep_ratio` alone."""

    def __init__(self, step: StageRunner, prepared: Tensors, ratios: F32) -> None:
        """`prepared` comes from `prepare`; each timestep ratio given later must be one of `ratios`."""
        self._rows = {float(ratio): row for row, ratio in enumerate(ratios)}
        self._modulation = prepared[MODULATION]  # (len(ratios), columns) float32
        self._runner = step
        self._step = step.bind({name: value for name, value in prepared.items() if name != MODULATION})

    def __call__(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        rows = [self._rows[float(ratio)] for ratio in inputs["timestep_ratio"]]
        return self._step({"sample": inputs["sample"], MODULATION: self._modulation[rows]})

    def close(self) -> None:
        self._runner.close()


def prepare(conditioning: StageRunner, stage: Stage, sample: F32, conditions: Tensors, ratios: F32) -> Tensors:
    """Run the conditioning graph: the inputs that the step graph needs for all of `ratios`. Those that are the same in
    every step stay in the engine's memory.

    `conditions` are the other input ports (B, ...). `sample` gives the decoder the size of the latents."""
    size = {"sample": sample} if stage is Stage.DECODER else {}
    control = {name: value for name, value in conditions.items() if is_control(name)}  # inputs of the step graph
    rest = {name: value for name, value in conditions.items() if name not in control}
    return {**conditioning.keep({**size, **rest, RATIOS: ratios}, (MODULATION,)), **control}


def is_hoisted(engine: Engine, stage: Stage) -> bool:
    """True if the stage runs as two graphs: the engine has both, and they are faster than one."""
    in_parts = getattr(engine, "in_parts", FASTER_IN_PARTS)  # an engine without the attribute is as on a CPU
    return stage in in_parts and {CONDITIONING, STEP} <= set(engine.graphs(stage))
