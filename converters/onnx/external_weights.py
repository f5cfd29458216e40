"""Weights as initialisers: byte ranges of safetensors files in the folder of the graph.

A graph refers to the file of a `TensorRange` by its name alone, at any alignment.
"""

import math
from collections.abc import Mapping

from onnx import TensorProto

from ...schemas.quantization import StoredTensor
from ...schemas.tensors import Shape
from ...storage.safetensors_reader import TensorRange

STORAGE_TYPES: Mapping[str, int] = {
    "F32": TensorProto.FLOAT,
    "BF16": TensorProto.BFLOAT16,
    "F16": TensorProto.FLOAT16,
}


def problem_of(weight: TensorRange | None, shape: Shape) -> str | None:
    """A description of why `weight` cannot serve as a tensor of `shape`; None when it can."""
    if weight is None:
        return f"missing, expected shape {list(shape)}"
    if weight.shape != shape:
        return f"shape {list(weight.shape)}, expected {list(shape)}"
    if weight.dtype not in STORAGE_TYPES:
        return f"stored as {weight.dtype}, expected {', '.join(STORAGE_TYPES)}"
    nbytes = math.prod(shape) * (4 if weight.dtype == "F32" else 2)
    return None if weight.nbytes == nbytes else f"{weight.nbytes} bytes, expected {nbytes}"


def difference_of(weight: TensorRange | None, described: StoredTensor) -> str | None:
    """A description of how `weight` differs from `described` in dtype, shape or bytes; None when it does not."""
    found = (weight.dtype, weight.shape, weight.nbytes) if weight else None
    if found == (described.dtype, described.shape, described.nbytes):
        return None
    is_there = f"{weight.dtype} {list(weight.shape)} of {weight.nbytes} bytes" if weight else "missing"
    return f"{is_there}, expected {described.dtype} {list(described.shape)} of {described.nbytes} bytes"


def external_tensor(name: str, dims: Shape, weight: TensorRange | None, data_type: int | None = None) -> TensorProto:
    """An initialiser whose bytes are those of `weight`, of `data_type` or of the weight's own."""
    tensor = TensorProto(name=name, dims=dims, data_location=TensorProto.EXTERNAL)
    if weight is not None:
        tensor.data_type = data_type or STORAGE_TYPES.get(weight.dtype, TensorProto.UNDEFINED)
        for key, value in (("location", weight.path.name), ("offset", weight.offset), ("length", weight.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
    return tensor
