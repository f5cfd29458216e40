"""Prior and decoder in two parts: what an image's conditions and schedule decide, once, and the step."""

from typing import Any

from numpy.typing import NDArray

from ...schemas.control import is_control
from ...schemas.hoisted import MODULATION, RATIOS
from ...schemas.stages import Stage
from ..engines.base import Engine, HostRunner, StageRunner, Tensors
from .ddpm import F32

CONDITIONING, STEP = "conditioning", "step"
# The prior has 85 conditioning tokens for its 576, and saves 1 to 4% of a step. The decoder has 4, which cost less than
# bringing their keys and values to those of the image; see docs/graph.md.
FASTER_IN_PARTS = (Stage.PRIOR,)


class HoistedStage(HostRunner):
    """A stage in two parts that takes `sample` and `timestep_ratio` alone; the latter of `ratios` only."""

    def __init__(self, step: StageRunner, prepared: Tensors, ratios: F32) -> None:
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
    """What a step needs of `conditions`, the other input ports (B, ...), for latents of the size of `sample` and for
    all of `ratios`."""
    size = {"sample": sample} if stage is Stage.DECODER else {}
    control = {name: value for name, value in conditions.items() if is_control(name)}  # for the step itself
    rest = {name: value for name, value in conditions.items() if name not in control}
    return {**conditioning({**size, **rest, RATIOS: ratios}), **control}


def is_hoisted(engine: Engine, stage: Stage) -> bool:
    """Whether the stage runs in two parts: where the engine has them, and where that is faster."""
    return stage in FASTER_IN_PARTS and {CONDITIONING, STEP} <= set(engine.graphs(stage))
