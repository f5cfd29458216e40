"""Casts between float formats on raw bytes, in numpy: the results of torch's `.to(dtype)`, without torch.

ml_dtypes rounds to BF16. Every value but NaN equals torch's bit for bit: values are rounded to nearest, ties to even,
and a float64 goes through float32 as in torch.

A NaN keeps its sign and the leading bits of its payload, and becomes quiet. Only BF16 to F32 keeps all its bits. The
NaNs of torch are the same except in BF16: there its kernels give 0x7FC0 or 0xFFFF, depending on the memory layout.

fp8 is read but not written. Each fp8 value is a float32 value, so it is multiplied by its scale in float32 and rounded
once. The 256 values are looked up in a table, which is 5 times as fast as the cast of ml_dtypes.

GGUF's blocks are unpacked to float32 and then cast, or packed from float32 (see `gguf_blocks`).
"""

import math
from typing import Any, NamedTuple

import numpy as np
from ml_dtypes import bfloat16, float8_e4m3fn
from numpy.typing import NDArray

from ..schemas.block_types import BLOCK_TYPES, SCALED_TYPES
from ..schemas.casts import castable
from ..schemas.dtypes import DTYPES, FLOATS, FP8
from ..schemas.errors import ConversionError
from .codes import code_values
from .gguf_blocks import pack, unpack

Array = NDArray[Any]
Scaling = np.float32 | NDArray[np.float32] | None  # one factor, or one for each value

_INFINITY = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F80_0000, "F64": 0x7FF0_0000_0000_0000, "F8_E5M2": 0x7C}
_NOT_FINITE = _INFINITY | {"F8_E4M3": 0x7F}  # the first bits without sign that are not finite; E4M3 has no infinity

# The size from which rounding gives infinity: half a step above the target's largest value.
_LIMIT = {"F16": 65520.0, "BF16": (2 - 2**-8) * 2.0**127, "F32": math.inf, "F64": math.inf}

_CHUNK = 1 << 18  # elements per step: the scratch space of a step stays in a core's cache


class Cast(NamedTuple):
    """The result of a cast.

    `overflow` counts finite values that became infinite. `not_finite` counts values that were NaN or infinite before;
    it stays 0 where source and target are the same dtype."""

    values: Array
    overflow: int
    not_finite: int


def cast_block(data: bytes | memoryview, source: str, target: str) -> tuple[Array, int]:
    """Cast bytes of dtype `source` (little endian, any alignment) to a 1-D array of `target`, BF16 as uint16 patterns.

    Also returns how many finite values became infinite. Raises ConversionError for dtypes that `castable` refuses."""
    return cast_counted(data, source, target)[:2]


def cast_counted(data: bytes | memoryview, source: str, target: str, scale: Scaling = None) -> Cast:
    """Cast like `cast_block`; each value is multiplied by `scale`, or its own part of it, in float32 before it is
    rounded.

    Blocks of GGUF are an array of bytes. Raises ConversionError for values to pack that are not finite."""
    if not castable(source, target):
        raise ConversionError(f"{source} cannot become {target}; choose one of {', '.join(FLOATS)}")
    if source in BLOCK_TYPES:
        data, source = unpack(np.frombuffer(data, np.uint8), source).data, "F32"
    if source in SCALED_TYPES:
        data, source = code_values(np.frombuffer(data, np.uint8), source).data, "F32"
    if target in BLOCK_TYPES:
        return _pack(cast_counted(data, source, "F32", scale).values, target)
    values = np.frombuffer(data, DTYPES[source].numpy)
    if source == target and scale is None:
        return Cast(values, 0, 0)
    if source in FP8 and not isinstance(scale, np.ndarray):
        return _cast_fp8(values, source, target, scale)
    if source in FP8:
        values, source = _FP8_VALUES[source][values], "F32"
    out = np.empty(values.size, DTYPES[target].numpy)
    scratch = np.empty(min(values.size, _CHUNK), "<f4")
    overflow = not_finite = 0
    with np.errstate(all="ignore"):  # overflow is counted, and quieting a NaN is no event
        for start in range(0, values.size, _CHUNK):
            part = slice(start, start + _CHUNK)
            room = scratch[: values.size - start]
            factor = scale[part] if isinstance(scale, np.ndarray) else scale
            counts = _cast(values[part], out[part], room, source=source, target=target, scale=factor)
            overflow, not_finite = overflow + counts[0], not_finite + counts[1]
    return Cast(out, overflow, not_finite)


def _pack(values: Array, target: str) -> Cast:
    if not np.isfinite(values).all():
        raise ConversionError(f"holds NaN or infinities, which blocks of {target} cannot; write it as float")
    return Cast(pack(values, target), 0, 0)


def _cast_fp8(values: Array, source: str, target: str, scale: np.float32 | None) -> Cast:
    """Look every value up in a table of the results for the 256 codes."""
    codes = _FP8_VALUES[source]
    with np.errstate(all="ignore"):
        floats = codes if scale is None else codes * scale
    table = cast_counted(floats.tobytes(), "F32", target).values
    overflows = np.isfinite(codes) & (_unsigned(table) == _INFINITY[target])
    out = np.empty(values.size, DTYPES[target].numpy)
    overflow = not_finite = 0
    for start in range(0, values.size, _CHUNK):
        part = values[start : start + _CHUNK]
        np.take(table, part, out=out[start : start + _CHUNK], mode="clip")  # other modes copy once more
        overflow += int(np.count_nonzero(overflows[part])) if overflows.any() else 0
        not_finite += _count_not_finite(part, source)
    return Cast(out, overflow, not_finite)


def _cast(values: Array, out: Array, scratch: Array, *, source: str, target: str, scale: Scaling) -> tuple[int, int]:
    """Fill `out`. Return how many values became infinite, and how many were not finite before."""
    floats = _as_f32(values, source, scratch)
    if scale is not None:
        floats = np.multiply(floats, scale, out=scratch)
    if target == "BF16":
        out.view(bfloat16)[:] = floats
    else:
        out[:] = floats
    limit = _LIMIT[target]
    if -limit < floats.min() and floats.max() < limit:  # false for a NaN too
        return 0, 0
    if target in ("F16", "BF16"):
        _put_nans(floats, out, target)
    # A scale of 0 makes NaN of infinities; fewer of them are no overflow.
    return max(0, _infinities(out, target) - _infinities(values, source)), _count_not_finite(values, source)


def _as_f32(values: Array, source: str, scratch: Array) -> Array:
    if source == "F32":
        return values
    if source == "BF16":
        scratch[:] = values.view(bfloat16)
        return scratch
    scratch[:] = values
    if source == "F16":
        nan = np.isnan(scratch)
        if nan.any():  # numpy leaves signalling NaNs as they are
            scratch.view("<u4")[nan] |= 0x40_0000
    return scratch


def _put_nans(floats: Array, out: Array, target: str) -> None:
    """Write the NaNs of `floats` to `out`, F16 or BF16: the sign, the quiet bit, the payload's leading bits."""
    nan = np.isnan(floats)
    bits = floats.view("<u4")[nan]
    if target == "F16":
        out.view("<u2")[nan] = (bits >> 16 & 0x8000) | 0x7E00 | (bits >> 13 & 0x1FF)
    else:
        out[nan] = bits >> 16 | 0x40


def _infinities(values: Array, dtype: str) -> int:
    return int(np.count_nonzero(_unsigned(values) == _INFINITY[dtype])) if dtype in _INFINITY else 0


def _count_not_finite(values: Array, dtype: str) -> int:
    return int(np.count_nonzero(_unsigned(values) >= _NOT_FINITE[dtype]))


def _unsigned(values: Array) -> Array:
    """The bits of the values without their sign."""
    bits = values.view(f"<u{values.itemsize}")
    return np.asarray(bits & (1 << 8 * bits.itemsize - 1) - 1)


def _e4m3_values() -> Array:
    """The float32 value of each of the 256 codes of E4M3."""
    values: Array = np.arange(256, dtype="u1").view(float8_e4m3fn).astype("<f4")
    values.view("<u4")[[0x7F, 0xFF]] = 0x7FF0_0000, 0xFFF0_0000  # its NaNs, with the payload that torch gives them
    return values


def _e5m2_values() -> Array:
    """The float32 value of each of the 256 codes of E5M2, which are the upper bytes of float16 values."""
    halves = np.arange(256, dtype="<u2") << 8
    return _as_f32(halves.view("<f2"), "F16", np.empty(256, "<f4"))


_FP8_VALUES = {"F8_E4M3": _e4m3_values(), "F8_E5M2": _e5m2_values()}
