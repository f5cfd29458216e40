"""The ways an engine runs a stage: whole, and in the two parts that images are drawn with."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.engines.base import F32, Engine, HostRunner, StageRunner, Tensors
from ..runtime.sampling.denoiser import HoistedStage, is_hoisted, prepare
from ..schemas.bundle import MAIN_GRAPH
from ..schemas.hoisted import CONDITIONING, STEP
from ..schemas.profiles import STEPS
from ..schemas.stages import Stage

IN_PARTS = " in two parts"

Load = Callable[[], StageRunner]


class InTwoParts(HostRunner):
    """A stage by its graphs "conditioning" and "step", fed as the whole is. Both are in memory: together they have the
    weights of the whole."""

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


def ways(engine: Engine, stage: Stage) -> Iterator[tuple[str, Load]]:
    """What to call each way, and how to load it: the whole where the engine has it, and two parts where it draws images
    with those. At least one."""
    parts = is_hoisted(engine, stage)
    if MAIN_GRAPH in engine.graphs(stage) or not parts:
        yield "", lambda: engine.load(stage)
    if parts:
        yield IN_PARTS, lambda: InTwoParts(engine, stage)


def _schedule(ratios: F32) -> F32:
    """A schedule of the usual length that ends in `ratios` (B,), among others: another row would be noticed."""
    others = np.linspace(1, 0.01, STEPS[1], dtype=np.float32)[: max(0, STEPS[1] - len(ratios))]
    return np.concatenate([others, ratios])
