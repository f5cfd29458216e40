"""Gives the weights that torchao quantised their scales, in safetensors files by diffusers and transformers.

torchao describes each tensor in the header's metadata by JSON: its class, its attributes and the tensors it consists
of. A weight X.weight of the class Int8Tensor is stored as `X._weight_qdata`, `X._weight_scale` and others."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ...schemas.dtypes import FLOATS, FP8
from ...schemas.errors import CheckpointError
from ...schemas.json_text import load_object, load_strings
from ...schemas.tensors import Shape
from ...storage.safetensors_reader import Header, Scale, TensorRange
from .layer_parts import ROUNDED, LayerParts, is_shape, with_weights

NAMES = "tensor_names"
PROGRAM, PLAIN = "torchao", "Tensor"
# The classes that are read: dtypes of their codes in the file, and as they are read.
CLASSES: Mapping[str, Mapping[str, str]] = {
    "Int8Tensor": {"I8": "INT8"},
    "IntxUnpackedToInt8Tensor": {"I8": "INT8"},
    "Float8Tensor": {dtype: dtype for dtype in FP8},
}
ZEROS: Mapping[str, str] = {"I8": "INT8", **{dtype: dtype for dtype in FLOATS}}
PARTS = ("qdata", "scale", "zero_point", "act_pre_scale")
INPUTS = ("act_quant_scale", "act_quant_zero_point")  # for products with rounded inputs only
ADVICE = "save what `weight.dequantize()` of torchao gives"


def attach_torchao(header: Header) -> Header:
    """Return the header with each quantised weight under its own name.

    Raises LayoutError for a class that is not read and for tensors that are missing or do not fit. Raises
    CheckpointError for metadata that is no JSON."""
    entries = _entries(header)
    described = {NAMES, *entries}
    metadata = {key: text for key, text in header.metadata.items() if key not in described}
    return replace(with_weights(header, _weights(header, entries)), metadata=metadata)


def _weights(header: Header, entries: Mapping[str, dict[str, Any]]) -> Iterator[tuple[LayerParts, TensorRange]]:
    for name, entry in entries.items():
        if entry.get("_type") != PLAIN:
            module, _, parameter = name.rpartition(".")
            names = {part: f"{module}._{parameter}_{part}" for part in (*PARTS, *INPUTS)}
            parts = LayerParts(header, PROGRAM, name, names, [*names.values()])
            yield parts, _weight(parts, entry)


def _entries(header: Header) -> dict[str, dict[str, Any]]:
    """Return the description of each tensor; none in files that torchao has not described."""
    if NAMES not in header.metadata:
        return {}
    try:
        names = load_strings(header.metadata[NAMES])
        return {name: load_object(header.metadata[name]) for name in names}
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"{header.path}: the metadata by torchao cannot be read ({error}); download or save the file again"
        ) from error


def _weight(parts: LayerParts, entry: Mapping[str, Any]) -> TensorRange:
    kind, data = str(entry.get("_type")), entry.get("_data")
    if kind not in CLASSES or not isinstance(data, dict):
        raise parts.error(f"its class {kind} is not supported; expected one of {', '.join(CLASSES)}", ADVICE)
    if parts.has("act_pre_scale"):
        raise parts.error("its inputs are scaled (act_pre_scale), which is not supported", ADVICE)
    codes = parts.take("qdata", CLASSES[kind])
    group = _group(parts, data.get("block_size"), codes.shape)
    count = math.prod(codes.shape) // group if group else 1
    factors = parts.take("scale", FLOATS, count)
    minus = None
    if parts.has("zero_point"):
        stored = parts.take("zero_point", ZEROS, count)
        minus = replace(stored, dtype=ZEROS[stored.dtype])
    scale = Scale(factors, group, minus=minus, rounded=_rounded(parts, data.get("dtype")), kind=f"{PROGRAM} {kind}")
    return replace(codes, dtype=CLASSES[kind][codes.dtype], scale=scale)


def _group(parts: LayerParts, block: Any, shape: Shape) -> int:
    """Return how many values in their order share a factor, 0 for all. Raises LayoutError where they do not follow
    each other."""
    if is_shape(block) and len(block) == len(shape) and not any(a % b for a, b in zip(shape, block, strict=True)):
        if tuple(block) == shape:
            return 0
        inner = next(axis for axis, size in enumerate(block) if size > 1 or axis == len(block) - 1)
        if tuple(block[inner + 1 :]) == shape[inner + 1 :]:
            return math.prod(block)
    raise parts.error(f"block_size {block} is not supported for shape {list(shape)}; expected blocks of a row", ADVICE)


def _rounded(parts: LayerParts, dtype: Any) -> str:
    """Return the dtype in which torchao gives the values."""
    found = str(dtype.get("_data")) if isinstance(dtype, dict) else ""
    if found not in ROUNDED:
        raise parts.error(f"its dtype is {found or 'not stated'}, expected one of {', '.join(ROUNDED)}", ADVICE)
    return ROUNDED[found]
