"""Converts the bytes of safetensors files to numpy arrays that LoRAs are calculated with, and back."""

import numpy as np
from numpy.typing import NDArray

from ...storage.cast import cast_block

Array = NDArray[np.floating]
Bytes = NDArray[np.uint8]


def compute_type(dtype: str) -> type[np.float32] | type[np.float64]:
    """Return the type to calculate with tensors of `dtype` in: float64 for F64, float32 for all others."""
    return np.float64 if dtype == "F64" else np.float32


def decode(data: bytes | memoryview, dtype: str) -> Array:
    """Return the numbers in `data` as a flat array of `compute_type(dtype)`. `dtype` is one of FLOATS."""
    values: Array = cast_block(data, dtype, "F64" if dtype == "F64" else "F32")[0]
    return values


def encode(values: Array, dtype: str) -> tuple[Bytes, int]:
    """Return the bytes of `values` in `dtype`, and the number of finite values that became infinite.

    Values are rounded to nearest, ties to even."""
    if dtype == "F64":
        values = values.astype("<f8")
    wide = "F64" if values.dtype == np.float64 else "F32"
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    if wide == dtype:
        return data, 0
    stored, overflows = cast_block(data.data, wide, dtype)
    return stored.view(np.uint8), overflows


def spacing(largest: float, dtype: str) -> float:
    """Return the distance between neighbouring numbers of `dtype` at `largest`."""
    types: dict[str, type[np.floating]] = {"F16": np.float16, "BF16": np.float32, "F32": np.float32, "F64": np.float64}
    distance = float(np.spacing(types[dtype](largest)))
    return distance * 65536 if dtype == "BF16" else distance  # BF16 is float32 with 16 bits less
