"""Floating point numbers between safetensors' bytes and the numpy arrays that LoRAs are calculated with."""

import numpy as np
from numpy.typing import NDArray

from ...schemas.dtypes import FLOATS, INTEGERS
from ...storage.cast import cast_block

Array = NDArray[np.floating]
Bytes = NDArray[np.uint8]

__all__ = ["FLOATS", "INTEGERS", "Array", "Bytes", "compute_type", "decode", "encode", "spacing"]


def compute_type(dtype: str) -> type[np.float32] | type[np.float64]:
    """The type to calculate in with tensors of `dtype`: float64 for F64, float32 for all others."""
    return np.float64 if dtype == "F64" else np.float32


def decode(data: bytes | memoryview, dtype: str) -> Array:
    """The numbers in `data`, flat, in the type to calculate in; exact. `dtype` is of FLOATS."""
    values: Array = cast_block(data, dtype, "F64" if dtype == "F64" else "F32")[0]
    return values


def encode(values: Array, dtype: str) -> tuple[Bytes, int]:
    """The bytes of `values` in `dtype`, rounded to the nearest, ties to even; and how many finite values became
    infinite."""
    wide = "F64" if values.dtype == np.float64 else "F32"
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    if wide == dtype:
        return data, 0
    if dtype == "F64":
        return np.ascontiguousarray(values, "<f8").reshape(-1).view(np.uint8), 0
    stored, overflows = cast_block(data.data, wide, dtype)
    return stored.view(np.uint8), overflows


def spacing(largest: float, dtype: str) -> float:
    """The distance between neighbouring numbers of `dtype` at `largest`."""
    if dtype == "BF16":  # float32 with 16 bits less
        return float(np.spacing(np.float32(largest))) * 65536
    kinds: dict[str, type[np.floating]] = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
    return float(np.spacing(kinds[dtype](largest)))
