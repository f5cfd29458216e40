"""Casts between float formats on raw bytes, in numpy: what torch's `.to(dtype)` gives, without torch.

Every value but NaN comes out bit for bit as torch's: rounded to nearest, ties to even, through float32 where the
source is float64 (torch does so too). A NaN stays a NaN and keeps its sign and the leading bits of its payload; it
becomes a quiet one, save from BF16 to F32, where nothing is recomputed. torch agrees on that unless the target is
BF16: there its NaN is 0x7FC0 or 0xFFFF, whichever of its kernels the memory layout selects.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.errors import UsageError

FLOATS = ("F16", "BF16", "F32", "F64")

Array = NDArray[Any]

# numpy has no bfloat16: its bits are kept as integers.
_STORAGE = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}
_BITS = {"F16": "<u2", "BF16": "<u2", "F32": "<u4", "F64": "<u8"}
_INFINITY = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F80_0000, "F64": 0x7FF0_0000_0000_0000}

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
    return source in FLOATS and target in FLOATS


def cast_block(data: bytes | memoryview, source: str, target: str) -> tuple[Array, int]:
    """Values of dtype `source` (little endian, any alignment) as a 1-D array of `target`, BF16 as uint16 patterns;
    and how many finite values became infinite. Both dtypes are of FLOATS."""
    values = np.frombuffer(data, _STORAGE[source])
    if source == target:
        return values, 0
    out = np.empty(values.size, _STORAGE[target])
    scratch = np.empty((2, min(values.size, _CHUNK)), "<f4")
    overflow = 0
    with np.errstate(all="ignore"):  # overflow is counted, and quieting a NaN is no event
        for start in range(0, values.size, _CHUNK):
            part = slice(start, start + _CHUNK)
            overflow += _cast(values[part], source, out[part], target, scratch[:, : values.size - start])
    return out, overflow


def _cast(values: Array, source: str, out: Array, target: str, scratch: Array) -> int:
    """Fill `out`; the number of values that are infinite there alone."""
    floats = _as_f32(values, source, scratch[0])
    if target == "BF16":
        _to_bf16(floats, out, scratch[1].view("<u4"))
    else:
        out[:] = floats
    limit = _LIMIT[target]
    if -limit < floats.min() and floats.max() < limit:  # false for a NaN too
        return 0
    if target in ("F16", "BF16"):
        _put_nans(floats, out, target)
    return _infinities(out, target) - _infinities(values, source)


def _as_f32(values: Array, source: str, scratch: Array) -> Array:
    if source == "F32":
        return values
    bits = scratch.view("<u4")
    if source == "BF16":
        bits[:] = values
        bits <<= 16
        return scratch
    scratch[:] = values
    if source == "F16":
        nan = np.isnan(scratch)
        if nan.any():  # numpy leaves signalling ones as they are
            bits[nan] |= 0x40_0000
    return scratch


def _to_bf16(floats: Array, out: Array, scratch: Array) -> None:
    """The upper half of each float32, after adding what carries into it when the lower half rounds up: 0x7FFF,
    and one more when the upper half is odd, so that ties go to even. Wrong for NaN."""
    bits = floats.view("<u4")
    np.right_shift(bits, 16, out=scratch)
    scratch &= 1
    scratch += 0x7FFF
    scratch += bits
    out[:] = scratch.view("<u2")[1::2]


def _put_nans(floats: Array, out: Array, target: str) -> None:
    """Write the NaNs of `floats` to `out`, F16 or BF16: the sign, the quiet bit, the payload's leading bits."""
    nan = np.isnan(floats)
    bits = floats.view("<u4")[nan]
    if target == "F16":
        out.view("<u2")[nan] = (bits >> 16 & 0x8000) | 0x7E00 | (bits >> 13 & 0x1FF)
    else:
        out[nan] = bits >> 16 | 0x40


def _infinities(values: Array, dtype: str) -> int:
    bits = values.view(_BITS[dtype])
    unsigned = bits & (1 << 8 * bits.itemsize - 1) - 1
    return int(np.count_nonzero(unsigned == _INFINITY[dtype]))
