"""Float32 rows as the codes and factors of ComfyUI's formats, in numpy, and what the codes are worth.

Codes and factors equal those of comfy-kitchen's eager backend bit for bit, with two exceptions. A matrix of zeros has
the factor 1, where comfy-kitchen would divide by zero. The exponents of mxfp8 are exact, where comfy-kitchen rounds a
logarithm.

| format | factor of all values | factor of a group |
|---|---|---|
| float8_e4m3fn, float8_e5m2, int8_tensorwise | largest magnitude / largest code | |
| mxfp8 | | the least power of two that is not below largest magnitude / 448 |
| nvfp4 | largest magnitude / (6 * 448) | largest magnitude / 6 / the factor of all values, in E4M3 |
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
from ml_dtypes import float4_e2m1fn, float8_e4m3fn, float8_e5m2
from numpy.typing import NDArray

from ..schemas.comfy_formats import FORMATS, TILE

Array = NDArray[Any]
Floats = NDArray[np.float32]

E4M3_MAX = np.float32(448)
LEAST_INT8_FACTOR = np.float32(1e-30)
_BIAS = 127  # of the exponents of mxfp8
# The dtype of each format's codes.
_DTYPES: Mapping[str, Any] = {
    "float8_e4m3fn": float8_e4m3fn,
    "float8_e5m2": float8_e5m2,
    "int8_tensorwise": np.int8,
    "mxfp8": float8_e4m3fn,
    "nvfp4": float4_e2m1fn,
}
_STEP = 1 << 16  # values at a time, so that the scratch space of a step stays in a core's cache


def overall_factor(kind: str, largest: np.float32) -> np.float32:
    """Return the factor of all values of a matrix whose largest magnitude is `largest`; mxfp8 has none: 1."""
    if kind == "mxfp8" or not largest:
        return np.float32(1)
    if kind == "nvfp4":
        return np.float32(largest / np.float32(FORMATS[kind].top * E4M3_MAX))
    factor = np.float32(largest / np.float32(FORMATS[kind].top))
    return max(factor, LEAST_INT8_FACTOR) if kind == "int8_tensorwise" else factor


def group_factors(rows: Floats, kind: str, overall: np.float32) -> Array:
    """Return the factor of each group of mxfp8 or nvfp4 as a byte, (rows, groups)."""
    return _in_steps(lambda part: _group_factors(part, kind, overall), rows)


def _in_steps(function: Callable[[Floats], Array], rows: Floats) -> Array:
    """Apply a function to a few rows at a time, and join what it returns."""
    height = max(1, _STEP // rows.shape[1])
    return np.concatenate([function(rows[start : start + height]) for start in range(0, len(rows), height)])


def _group_factors(rows: Floats, kind: str, overall: np.float32) -> Array:
    largest = np.abs(rows).reshape(len(rows), -1, FORMATS[kind].group).max(axis=2)
    if kind == "nvfp4":
        wanted = largest / np.float32(FORMATS[kind].top) / overall
        return np.asarray(np.minimum(wanted, E4M3_MAX).astype(float8_e4m3fn).view(np.uint8))
    mantissa, exponent = np.frexp(largest / E4M3_MAX)
    least = exponent - (mantissa == 0.5) + _BIAS
    return np.where(largest == 0, 0, least.clip(0, 254)).astype(np.uint8)


def tiled(factors: Array) -> Array:
    """Return factors (rows, groups) in the tiles in which cuBLAS reads them, padded with zeros to whole tiles."""
    (rows, columns), (height, width) = factors.shape, TILE
    padded = np.pad(factors, ((0, -rows % height), (0, -columns % width)))
    tiles = padded.reshape(padded.shape[0] // height, 4, 32, padded.shape[1] // width, width)
    return np.ascontiguousarray(tiles.transpose(0, 3, 2, 1, 4)).reshape(padded.shape)


def codes(rows: Floats, kind: str, overall: np.float32) -> Array:
    """Return the codes of finite rows as bytes, (rows, bytes of a row)."""
    with np.errstate(all="ignore"):
        return _in_steps(lambda part: _codes(part, kind, overall), rows)


def _codes(rows: Floats, kind: str, overall: np.float32) -> Array:
    if kind == "int8_tensorwise":
        return np.asarray(np.rint(rows / overall).clip(-128, 127).astype(np.int8).view(np.uint8))
    scaled = _in_groups(rows, kind, overall) if FORMATS[kind].group else rows * (np.float32(1) / overall)
    found = rounded(scaled, _DTYPES[kind], FORMATS[kind].top)
    return np.asarray(found[:, 0::2] << 4 | found[:, 1::2] & 15) if kind == "nvfp4" else found


def worth(packed: Array, kind: str, overall: np.float32, factors: Array | None = None) -> Floats:
    """Return the float32 values of `codes`; `factors` are those of `group_factors`, for formats with groups."""
    if kind == "nvfp4":  # two codes in a byte
        packed = np.stack([packed >> 4, packed & 15], axis=2).reshape(len(packed), -1)
    values: Floats = packed.view(_DTYPES[kind]).astype(np.float32)
    if factors is None:
        return values * overall
    scale = _group_scale(kind, factors, overall)
    return (values.reshape(*factors.shape, -1) * scale[:, :, None]).reshape(len(values), -1)


def _group_scale(kind: str, factors: Array, overall: np.float32) -> Floats:
    if kind == "nvfp4":
        return np.asarray(factors.view(float8_e4m3fn).astype(np.float32) * overall, np.float32)
    return np.asarray(np.ldexp(np.float32(1), factors.astype(np.int32) - _BIAS), np.float32)


def rounded(values: Floats, dtype: Any, top: float) -> Array:
    """Return the codes of values in a float type of at most 8 bits: those of `values.clip(-top, top).astype(dtype)`.

    A code depends on the upper 16 bits of a float32, and on whether any lower bit is set. The lowest of the 16 bits is
    set where that is so, and the code is looked up: values are rounded once, to nearest, ties to even."""
    halves = np.ascontiguousarray(values).view("<u2").reshape(*values.shape, 2)
    return np.asarray(_table(dtype, top)[halves[..., 1] | (halves[..., 0] != 0)])


@cache
def _table(dtype: Any, top: float) -> Array:
    """The code of every float32 whose lower 16 bits are 0."""
    with np.errstate(all="ignore"):
        values = (np.arange(1 << 16, dtype="<u4") << 16).view("<f4").clip(-top, top)
        return np.asarray(values.astype(dtype).view(np.uint8))


def _in_groups(rows: Floats, kind: str, overall: np.float32) -> Floats:
    """Values divided by the factors of their groups; groups of factor 0 become zeros."""
    scale = _group_scale(kind, _group_factors(rows, kind, overall), overall)
    grouped = rows.reshape(len(rows), -1, FORMATS[kind].group)
    return np.asarray((grouped / np.where(scale == 0, np.float32(np.inf), scale)[:, :, None]).reshape(rows.shape))
