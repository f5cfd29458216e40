"""Estimates the time, memory and disk of a build, and checks that this machine has enough.

The constants are fitted to builds of our graphs by TensorRT-RTX 1.7 on two cores, with 0.5 million to 0.9 billion
parameters and 70 to 3300 nodes. `cascadekit bench build` measures the error of the estimates. Memory is the process's
own, without pages of the weights' file, which the system takes back when it needs them.
"""

import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx

from ...runtime.memory.free_memory import free_memory
from ...schemas.errors import EngineError
from ...schemas.hoisted import CONDITIONING
from ...schemas.messages import shown_bytes
from ...schemas.precision import Precision
from ..export.graph_files import DTYPES

MIB = 1 << 20
MEMORY_BASE, MEMORY_PER_NODE, MEMORY_PER_WEIGHT = 130 * MIB, 0.34 * MIB, 1.33
# TensorRT joins the many products of the same tokens, which takes a second copy of their weights.
MEMORY_PER_WEIGHT_OF = {CONDITIONING: 2.2}
SECONDS_BASE, SECONDS_PER_NODE, SECONDS_PER_BYTE = 0.4, 0.009, 6e-9
# Kernels are compiled for each profile; the profiles share the weights.
PLAN_BASE, PLAN_PER_NODE = 2 * MIB, 18_000


@dataclass(frozen=True)
class Estimate:
    """The expected cost of a build, and the size of the graph that it was computed from."""

    seconds: float
    memory: int  # bytes of the process's own
    plan: int  # bytes of the plan
    nodes: int
    weights: int  # bytes, in the type that the graph computes in


def estimate(model: onnx.ModelProto, name: str, precision: Precision, profiles: int) -> Estimate:
    """The cost of building the loaded graph `name` of a stage with so many profiles."""
    nodes = len(model.graph.node)
    weights = sum(_bytes(tensor, precision) for tensor in model.graph.initializer)
    memory_per_weight = MEMORY_PER_WEIGHT_OF.get(name, MEMORY_PER_WEIGHT)
    return Estimate(
        seconds=SECONDS_BASE + nodes * SECONDS_PER_NODE * profiles + weights * SECONDS_PER_BYTE,
        memory=int(MEMORY_BASE + nodes * MEMORY_PER_NODE * profiles + weights * memory_per_weight),
        plan=int(PLAN_BASE + nodes * PLAN_PER_NODE * profiles + weights),
        nodes=nodes,
        weights=weights,
    )


def _bytes(tensor: onnx.TensorProto, precision: Precision) -> int:
    """Bytes of the tensor in the type that the graph computes in; quantised tensors keep their size."""
    elements: int = math.prod(tensor.dims)
    stored = DTYPES.get(tensor.data_type)
    if stored in ("F32", "F16", "BF16"):
        return elements * (4 if precision is Precision.FP32 else 2)
    return elements * (8 if tensor.data_type == onnx.TensorProto.INT64 else 1)


def require_room(what: str, needed: Iterable[Estimate], folder: Path, *, memory: bool = True) -> None:
    """Raises EngineError when the largest build needs more memory than is free, or when the disk is too small.

    The disk is that of `folder`, where all plans must fit. Memory is not checked when `memory` is false."""
    needed = tuple(needed)
    most = max((each.memory for each in needed), default=0)
    free = free_memory()
    if memory and free is not None and most > free:
        raise EngineError(
            f"{what}: building takes about {shown_bytes(most)} of memory, {shown_bytes(free)} are free here; close "
            "other programs, build on a larger machine (plans can be moved), or try it with check_memory=False"
        )
    room, on_disk = sum(each.plan for each in needed), shutil.disk_usage(folder).free
    if room > on_disk:
        raise EngineError(
            f"{folder}: the plans take about {shown_bytes(room)} of disk, {shown_bytes(on_disk)} are free; make room"
        )
