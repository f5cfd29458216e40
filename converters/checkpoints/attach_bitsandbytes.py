"""Gives the weights that bitsandbytes quantised their scales.

| kind | codes | beside them |
|---|---|---|
| nf4, fp4 | two in a byte of X.weight | `X.weight.quant_state.bitsandbytes__nf4` (JSON), `.quant_map`, `.absmax` |
| nf4, fp4, nested | the same | and `.nested_absmax`, `.nested_quant_map`, by which `.absmax` is stored in bytes |
| int8 | bytes of X.weight | `X.SCB`, the largest magnitude of each row; `X.weight_format`, 0 for rows |
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ...schemas.dtypes import DTYPES
from ...schemas.json_text import load_object
from ...storage.safetensors_reader import Header, Scale, TensorRange
from .layer_parts import ROUNDED, LayerParts, content, is_shape, with_weights

PROGRAM = "bitsandbytes"
STATE = ".quant_state.bitsandbytes__"
CODES: Mapping[str, str] = {"nf4": "NF4", "fp4": "FP4_BNB"}
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
SCB, FORMAT = ".SCB", ".weight_format"
INT8_STEP = 7.874015718698502e-3  # 1 / 127 as bitsandbytes spells it
MAX_JSON_BYTES = 4096


def attach_bitsandbytes(header: Header) -> Header:
    """Return the header with the scale of each quantised weight, without the tensors of scales.

    Raises LayoutError for a kind that is not read and for tensors that are missing or do not fit."""
    return with_weights(header, _weights(header))


def _weights(header: Header) -> Iterator[tuple[LayerParts, TensorRange]]:
    for key in header.tensors:
        if STATE in key:
            name, _, kind = key.partition(STATE)
            names = {"codes": name, "state": key, **{part: f"{name}.{part}" for part in PARTS}}
            parts = LayerParts(header, PROGRAM, name, names)
            yield parts, _four_bits(parts, kind)
        elif key.endswith(SCB):
            layer = key.removesuffix(SCB)
            names = {"codes": f"{layer}.weight", "SCB": key, "format": layer + FORMAT}
            parts = LayerParts(header, PROGRAM, names["codes"], names)
            yield parts, _eight_bits(parts)


def _four_bits(parts: LayerParts, kind: str) -> TensorRange:
    state = _state(parts)
    shape, block, dtype = state.get("shape"), state.get("blocksize"), str(state.get("dtype"))
    if kind not in CODES or state.get("quant_type") != kind:
        raise parts.error(f"its kind {state.get('quant_type')} is not supported; expected one of {', '.join(CODES)}")
    if not is_shape(shape) or type(block) is not int or block < 1 or dtype not in ROUNDED:
        raise parts.error(f"its state has shape {shape}, blocksize {block} and dtype {dtype}, which are not supported")
    size = tuple(shape or ())
    codes = parts.take("codes", DTYPES)
    parts.require_bytes(codes, -(-math.prod(size) // 2), size)
    blocks = -(-math.prod(size) // block)
    nested = parts.has("nested_absmax")
    factors = parts.take("absmax", ("U8",) if nested else ("F32",), blocks)
    parts.take("quant_map", ("F32",), 16)  # which is always the same
    factors = _unnested(parts, factors, state) if nested else factors
    scale = Scale(factors, block, rounded=ROUNDED[dtype], kind=f"{PROGRAM} {kind}")
    return replace(codes, dtype=CODES[kind], shape=size, scale=scale)


def _unnested(parts: LayerParts, factors: TensorRange, state: Mapping[str, Any]) -> TensorRange:
    """Return the factors of blocks with the scale that they have themselves."""
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if type(block) is not int or block < 1 or type(offset) is not float or not math.isfinite(offset):
        raise parts.error(f"its state has nested_blocksize {block} and nested_offset {offset}, expected numbers")
    wide = parts.take("nested_absmax", ("F32",), -(-math.prod(factors.shape) // block))
    table = parts.take("nested_quant_map", ("F32",), 256)
    return replace(factors, dtype="UINT8", scale=Scale(wide, block, table=table, added=offset))


def _state(parts: LayerParts) -> dict[str, Any]:
    stored = parts.take("state", ("U8",))
    if not stored.path.is_file():
        raise parts.error("its shape is inside the file, which a header from the Hub leaves out", "download the file")
    if stored.nbytes > MAX_JSON_BYTES:
        raise parts.error(f"{parts.names['state']} has {stored.nbytes} bytes, expected at most {MAX_JSON_BYTES}")
    try:
        return load_object(content(stored).decode("utf-8"))
    except ValueError as error:
        raise parts.error(f"{parts.names['state']} is no JSON ({error})", "download or save the file again") from error


def _eight_bits(parts: LayerParts) -> TensorRange:
    codes = parts.take("codes", ("I8",))
    if len(codes.shape) != 2:
        raise parts.error(f"it has shape {list(codes.shape)}, expected a matrix")
    factors = parts.take("SCB", ("F32",), codes.shape[0])
    if parts.has("format"):
        order = parts.take("format", ("U8", "I8"), 1)
        if order.path.is_file() and content(order) != b"\0":
            raise parts.error("its values are in the order of a GPU's tiles (weight_format), which is not supported")
    scale = Scale(factors, codes.shape[1], last=INT8_STEP, kind=f"{PROGRAM} int8")
    return replace(codes, dtype="INT8", scale=scale)
