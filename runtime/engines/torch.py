"""Runs the PyTorch reference behind the engine protocol; what every other engine is compared with."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from ...schemas.bundle import MAIN_GRAPH
from ...schemas.errors import EngineError
from ...schemas.ports import StagePorts
from ...schemas.precision import Precision
from ...schemas.stages import Stage
from .base import HostRunner, Tensors, check_inputs

Loader = Callable[[], tuple[nn.Module, StagePorts]]


class TorchEngine:
    """An engine on reference modules, each computing in the dtype of its weights; a stage's loader is called when the
    stage is loaded. With `compiled` torch.compile makes kernels of them, anew for every size, in minutes."""

    name = "torch"
    precision: Precision | None = None

    def __init__(self, loaders: Mapping[Stage, Loader], *, compiled: bool = False) -> None:
        self._loaders = loaders
        self._compiled = compiled

    def graphs(self, stage: Stage) -> tuple[str, ...]:
        return (MAIN_GRAPH,)

    def load(self, stage: Stage, graph: str = MAIN_GRAPH) -> "TorchStage":
        if stage not in self._loaders:
            raise EngineError(f"the reference has no {stage}; it has {', '.join(self._loaders)}")
        module, ports = self._loaders[stage]()
        if self._compiled:
            module.compile(dynamic=False)
        return TorchStage(stage, module, ports)


class TorchStage(HostRunner):
    """One reference module taking and giving numpy arrays, whatever it computes in."""

    def __init__(self, stage: Stage, module: nn.Module, ports: StagePorts) -> None:
        self.stage = stage
        self.ports = ports
        self._module: nn.Module | None = module
        self._dtype = next(module.parameters()).dtype

    def __call__(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        check_inputs(self.stage, self.ports.inputs, inputs)
        assert self._module is not None
        with torch.inference_mode():
            outputs = self._module(**{name: self._fed(array) for name, array in inputs.items()})
        return {name: tensor.to(torch.float32).numpy() for name, tensor in outputs.items()}

    def _fed(self, array: NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def close(self) -> None:
        self._module = None


def trace(module: nn.Module, inputs: Tensors, outputs: Sequence[str], path: Path) -> None:
    """Have torch's own exporter trace `module` with `inputs`, at their sizes alone, into an ONNX file at `path`;
    `outputs` are the names of what it gives."""
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    torch.onnx.export(
        module, (), path, kwargs=tensors, output_names=outputs, dynamo=True, external_data=True, verbose=False
    )


def matmul_rate(dtype: str, rows: int, inner: int, columns: int, seconds: float) -> float:
    """Multiply-adds per second of torch.mm in `dtype`, the best of as many products as fit into `seconds`."""
    kind = getattr(torch, dtype)
    a, b = torch.rand(rows, inner).to(kind), torch.rand(columns, inner).to(kind).T  # as a Linear has them
    best = float("inf")
    end = perf_counter() + seconds
    torch.mm(a, b)
    while perf_counter() < end:
        start = perf_counter()
        torch.mm(a, b)
        best = min(best, perf_counter() - start)
    return rows * inner * columns / best
