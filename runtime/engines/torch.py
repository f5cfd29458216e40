"""Runs the PyTorch reference behind the engine protocol; what every other engine is compared with."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from ...schemas.errors import EngineError
from ...schemas.ports import StagePorts
from ...schemas.stages import Stage
from .base import Tensors, check_inputs

Loader = Callable[[], tuple[nn.Module, StagePorts]]


class TorchEngine:
    """An engine on reference modules; a stage's loader is called when the stage is loaded."""

    name = "torch"

    def __init__(self, loaders: Mapping[Stage, Loader]) -> None:
        self._loaders = loaders

    def load(self, stage: Stage) -> "TorchStage":
        if stage not in self._loaders:
            raise EngineError(f"the reference has no {stage}; it has {', '.join(self._loaders)}")
        return TorchStage(stage, *self._loaders[stage]())


class TorchStage:
    """One reference module taking and giving numpy arrays."""

    def __init__(self, stage: Stage, module: nn.Module, ports: StagePorts) -> None:
        self.stage = stage
        self.ports = ports
        self._module: nn.Module | None = module

    def __call__(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        check_inputs(self.stage, self.ports.inputs, inputs)
        assert self._module is not None
        with torch.inference_mode():
            outputs = self._module(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        return {name: tensor.numpy() for name, tensor in outputs.items()}

    def close(self) -> None:
        self._module = None
