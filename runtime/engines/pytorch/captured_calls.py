"""Replays a network as a CUDA graph: one launch for a pass, instead of thousands.

No GPU has run this yet. The calls are those of the notes on CUDA graphs in PyTorch's documentation.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ....schemas.stages import Stage
from .device import HOST

Compute = Callable[..., Mapping[str, torch.Tensor]]  # takes the inputs by name

CAPTURED = (Stage.PRIOR, Stage.DECODER)  # stages that run many times for an image
WARM_UPS = 3  # passes before a capture, in which libraries allocate and choose their kernels
MOST_GRAPHS = 4  # each shape has a graph, and each graph keeps the memory of a pass


@dataclass(frozen=True)
class _Captured:
    """A captured pass: replaying it computes `outputs` from what `inputs` hold at that time."""

    graph: Any
    inputs: Mapping[str, torch.Tensor]
    outputs: Mapping[str, torch.Tensor]


class CapturedCalls:
    """A function of tensors on a GPU that is captured once for each set of shapes, and replayed from then on.

    Outputs are overwritten by the next call. Of more than MOST_GRAPHS graphs, the one that was used longest ago is
    dropped. Graphs share a pool of memory, as they never run at the same time. One thread calls it."""

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._captured: dict[tuple[Any, ...], _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, **inputs: torch.Tensor) -> Mapping[str, torch.Tensor]:
        key = tuple((name, value.dtype, *value.shape) for name, value in inputs.items())
        captured = self._captured.pop(key, None) or self._capture(inputs)
        self._captured[key] = captured  # the newest is last
        for name, value in inputs.items():
            captured.inputs[name].copy_(value)
        captured.graph.replay()
        return captured.outputs

    def _capture(self, inputs: Mapping[str, torch.Tensor]) -> _Captured:
        while len(self._captured) >= MOST_GRAPHS:
            del self._captured[next(iter(self._captured))]
        fixed = {name: value.clone() for name, value in inputs.items()}
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                self._compute(**fixed)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Another thread may load a stage meanwhile: its calls are no reason to give up the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = self._compute(**fixed)
        return _Captured(graph, fixed, outputs)


def captured_on_gpu(compute: Compute, stage: Stage, device: str) -> Compute:
    """`compute` as CUDA graphs, if `device` is a GPU and `stage` runs many times for an image; else as it is."""
    return CapturedCalls(compute) if device != HOST and stage in CAPTURED else compute
