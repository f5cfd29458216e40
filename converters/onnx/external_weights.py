"""Weights as initialisers: byte ranges of files beside the graph."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from onnx import TensorProto

from ...schemas.quantization import StoredTensor
from ...schemas.tensors import Shape

STORAGE_TYPES: Mapping[str, int] = {
    "F32": TensorProto.FLOAT,
    "BF16": TensorProto.BFLOAT16,
    "F16": TensorProto.FLOAT16,
}


@dataclass(frozen=True)
class Weight:
    """Where the bytes of an initialiser lie; the graph refers to them as ONNX external data.

    `dtype` in safetensors' spelling (F32, BF16, F16), `location` a file name relative to the model's folder,
    `offset` and `length` in bytes, at any alignment.
    """

    dtype: str
    shape: tuple[int, ...]
    location: str
    offset: int
    length: int


def problem_of(weight: Weight | None, shape: Shape) -> str | None:
    """A description of why `weight` cannot serve as a tensor of `shape`; None when it can."""
    if weight is None:
        return f"missing, expected shape {list(shape)}"
    if weight.shape != shape:
        return f"shape {list(weight.shape)}, expected {list(shape)}"
    if weight.dtype not in STORAGE_TYPES:
        return f"stored as {weight.dtype}, expected {', '.join(STORAGE_TYPES)}"
    nbytes = math.prod(shape) * (4 if weight.dtype == "F32" else 2)
    return None if weight.length == nbytes else f"{weight.length} bytes, expected {nbytes}"


def difference_of(weight: Weight | None, described: StoredTensor) -> str | None:
    """A description of how `weight` differs from `described` in dtype, shape or bytes; None when it does not."""
    found = (weight.dtype, weight.shape, weight.length) if weight else None
    if found == (described.dtype, described.shape, described.nbytes):
        return None
    is_there = f"{weight.dtype} {list(weight.shape)} of {weight.length} bytes" if weight else "missing"
    return f"{is_there}, expected {described.dtype} {list(described.shape)} of {described.nbytes} bytes"


def external_tensor(name: str, dims: Shape, weight: Weight | None, data_type: int | None = None) -> TensorProto:
    """An initialiser whose bytes lie where `weight` says, of `data_type` or of the weight's own."""
    tensor = TensorProto(name=name, dims=dims, data_location=TensorProto.EXTERNAL)
    if weight is not None:
        tensor.data_type = data_type or STORAGE_TYPES.get(weight.dtype, TensorProto.UNDEFINED)
        for key, value in (("location", weight.location), ("offset", weight.offset), ("length", weight.length)):
            tensor.external_data.add(key=key, value=str(value))
    return tensor
