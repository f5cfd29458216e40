"""Loads a stage as one graph, or as the two graphs that sampling uses; `verify` compares both.

The graph "conditioning" computes once what depends on the prompt alone; the graph "step" computes the rest.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.engines.protocol import F32, Engine, HostRunner, StageRunner, Tensors
from ..runtime.sampling.denoiser import HoistedStage, is_hoisted, prepare
from ..schemas.hoisted import CONDITIONING, STEP
from ..schemas.manifest import MAIN_GRAPH
from ..schemas.profiles import STEPS
from ..schemas.stages import Stage


@dataclass(frozen=True)
class StageLoader:
    """One way to load a stage: `name` follows the stage's name in reports, and is empty for the single graph."""

    name: str
    load: Callable[[], StageRunner]


class TwoPartStage(HostRunner):
    """A stage as its graphs "conditioning" and "step", with the inputs and outputs of the single graph.

    Both graphs are in memory. Together they have the weights of the single graph."""

    def __init__(self, engine: Engine, stage: Stage) -> None:
        """Raises EngineError when either cannot be loaded."""
        self._stage = stage
        self._conditioning = engine.load(stage, CONDITIONING)
        try:
            self._step = engine.load(stage, STEP)
        except BaseException:
            self._conditioning.close()
            raise

    def __call__(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        changing = ("sample", "timestep_ratio")
        conditions = {name: value for name, value in inputs.items() if name not in changing}
        ratios = _schedule(inputs["timestep_ratio"])
        prepared = prepare(self._conditioning, self._stage, inputs["sample"], conditions, ratios)
        return HoistedStage(self._step, prepared, ratios)({name: inputs[name] for name in changing})

    def close(self) -> None:
        self._step.close()
        self._conditioning.close()


def stage_loaders(engine: Engine, stage: Stage) -> Iterator[StageLoader]:
    """Every way in which the engine runs the stage, at least one; the single graph comes first if there is one."""
    hoisted = is_hoisted(engine, stage)
    if MAIN_GRAPH in engine.graphs(stage) or not hoisted:
        yield StageLoader("", lambda: engine.load(stage))
    if hoisted:
        yield StageLoader("in two parts", lambda: TwoPartStage(engine, stage))


def _schedule(ratios: F32) -> F32:
    """A schedule of the usual length that ends in `ratios` (batch,), so that a step with a wrong row is noticed."""
    others = np.linspace(1, 0.01, STEPS[1], dtype=np.float32)[: max(0, STEPS[1] - len(ratios))]
    return np.concatenate([others, ratios])
