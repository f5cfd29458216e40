"""Casts between float formats on raw bytes, in numpy: what torch's `.to(dtype)` gives, without torch.

Every value but NaN comes out bit for bit as torch's: rounded to nearest, ties to even, through float32 where the
source is float64 (torch does so too). A NaN stays a NaN and keeps its sign and the leading bits of its payload; it
becomes a quiet one, save from BF16 to F32, where nothing is recomputed. torch agrees on that unless the target is
BF16: there its NaN is 0x7FC0 or 0xFFFF, whichever of its kernels the memory layout selects.

fp8 is only read. All its values are float32 values; a scale is multiplied in there, so that one rounding follows.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from ml_dtypes import bfloat16, float8_e4m3fn
from numpy.typing import NDArray

from ..schemas.errors import ConversionError, UsageError

FLOATS = ("F16", "BF16", "F32", "F64")
FP8 = ("F8_E4M3", "F8_E5M2")  # cast from, never to

Array = NDArray[Any]

# numpy has no bfloat16 and no fp8: their bits are kept as integers.
_STORAGE = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8", "F8_E4M3": "u1", "F8_E5M2": "u1"}
_BITS = {"F16": "<u2", "BF16": "<u2", "F32": "<u4", "F64": "<u8", "F8_E4M3": "u1", "F8_E5M2": "u1"}
_INFINITY = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F80_0000, "F64": 0x7FF0_0000_0000_0000, "F8_E5M2": 0x7C}
_NOT_FINITE = _INFINITY | {"F8_E4M3": 0x7F}  # the first pattern without sign that is no number; E4M3 has no infinity

# Where rounding begins to give infinity: half a step above the target's largest value.
_LIMIT = {"F16": 65520.0, "BF16": (2 - 2**-8) * 2.0**127, "F32": math.inf, "F64": math.inf}

_CHUNK = 1 << 18  # elements per step: the scratch space of a step stays in a core's cache


def target_dtype(source: str, wanted: str | None) -> str:
    """The dtype a tensor of dtype `source` is written in when `wanted` is asked for: floats follow, integers and
    booleans keep theirs, and without a wish everything does. Raises UsageError when `wanted` is none of FLOATS."""
    if wanted is None:
        return source
    if wanted not in FLOATS:
        raise UsageError(f"cannot cast to {wanted}; choose one of {', '.join(FLOATS)}")
    return wanted if source.startswith(("F", "BF")) else source


def castable(source: str, target: str) -> bool:
    """Whether `cast_block` takes this pair."""
    return source in (*FLOATS, *FP8) and target in FLOATS


class Cast(NamedTuple):
    """What a cast gives: the values, how many finite ones became infinite, how many were NaN or infinite before.

    The last is counted of values that are cast, not of those that come out as they were."""

    values: Array
    overflow: int
    not_finite: int


def cast_block(data: bytes | memoryview, source: str, target: str) -> tuple[Array, int]:
    """Values of dtype `source` (little endian, any alignment) as a 1-D array of `target`, BF16 as uint16 patterns;
    and how many finite values became infinite. Raises ConversionError for dtypes that `castable` refuses."""
    return cast_counted(data, source, target)[:2]


def cast_counted(data: bytes | memoryview, source: str, target: str, scale: np.float32 | None = None) -> Cast:
    """`cast_block`, each value multiplied by `scale` in float32 before it is rounded; with both counts."""
    if not castable(source, target):
        raise ConversionError(f"{source} cannot become {target}; choose one of {', '.join(FLOATS)}")
    values = np.frombuffer(data, _STORAGE[source])
    if source == target and scale is None:
        return Cast(values, 0, 0)
    if source in FP8:
        return _cast_fp8(values, source, target, scale)
    out = np.empty(values.size, _STORAGE[target])
    scratch = np.empty(min(values.size, _CHUNK), "<f4")
    overflow = not_finite = 0
    with np.errstate(all="ignore"):  # overflow is counted, and quieting a NaN is no event
        for start in range(0, values.size, _CHUNK):
            part = slice(start, start + _CHUNK)
            counts = _cast(values[part], source, out[part], target, scratch[: values.size - start], scale)
            overflow, not_finite = overflow + counts[0], not_finite + counts[1]
    return Cast(out, overflow, not_finite)


def _cast_fp8(values: Array, source: str, target: str, scale: np.float32 | None) -> Cast:
    """Every value looked up in a table of what the 256 codes become."""
    codes = _FP8_VALUES[source]
    with np.errstate(all="ignore"):
        floats = codes if scale is None else codes * scale
    table = cast_counted(floats.tobytes(), "F32", target).values
    overflows = np.isfinite(codes) & (_unsigned(table, target) == _INFINITY[target])
    out = np.empty(values.size, _STORAGE[target])
    overflow = not_finite = 0
    for start in range(0, values.size, _CHUNK):
        part = values[start : start + _CHUNK]
        np.take(table, part, out=out[start : start + _CHUNK], mode="clip")  # other modes copy once more
        overflow += int(np.count_nonzero(overflows[part])) if overflows.any() else 0
        not_finite += _count_not_finite(part, source)
    return Cast(out, overflow, not_finite)


def _cast(
    values: Array, source: str, out: Array, target: str, scratch: Array, scale: np.float32 | None
) -> tuple[int, int]:
    """Fill `out`; the number of values that are infinite there alone, and of those that were not finite before."""
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
    return int(np.count_nonzero(_unsigned(values, dtype) == _INFINITY[dtype])) if dtype in _INFINITY else 0


def _count_not_finite(values: Array, dtype: str) -> int:
    return int(np.count_nonzero(_unsigned(values, dtype) >= _NOT_FINITE[dtype]))


def _unsigned(values: Array, dtype: str) -> Array:
    """The patterns without their sign."""
    bits = values.view(_BITS[dtype])
    return np.asarray(bits & (1 << 8 * bits.itemsize - 1) - 1)


def _e4m3_values() -> Array:
    """The float32 value of each of the 256 codes of E4M3."""
    values = np.arange(256, dtype="u1").view(float8_e4m3fn).astype("<f4")
    values.view("<u4")[[0x7F, 0xFF]] = 0x7FF0_0000, 0xFFF0_0000  # its NaNs, with the payload that torch gives them
    return values


def _e5m2_values() -> Array:
    """The same of E5M2, which is the upper half of float16."""
    halves = np.arange(256, dtype="<u2") << 8
    return _as_f32(halves.view("<f2"), "F16", np.empty(256, "<f4"))


_FP8_VALUES = {"F8_E4M3": _e4m3_values(), "F8_E5M2": _e5m2_values()}
