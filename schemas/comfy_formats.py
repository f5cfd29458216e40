"""The formats in which ComfyUI stores quantised weights, and the tensors that describe them.

A layer X has the codes in `X.weight`, factors in `X.weight_scale` and, in nvfp4, a factor of all values in
`X.weight_scale_2`. Its format is named in the header's metadata, in the JSON of the tensor `X.comfy_quant`, or in
both."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from .dtypes import FLOATS

METADATA = "_quantization_metadata"
WEIGHT, QUANT = ".weight", ".comfy_quant"
SCALE, OVERALL = ".weight_scale", ".weight_scale_2"
TILE = (128, 4)  # rows and columns of a tile, in which cuBLAS keeps the factors of mxfp8 and nvfp4


class ComfyFormat(NamedTuple):
    """A format of quantised weights: dtype in the file, dtype as it is read, the values that share a factor (0: all or
    those of a row), and the dtypes of the factors.

    `top` is the largest magnitude of a code. `multiple` is what ComfyUI pads both sizes of a matrix to."""

    stored: str
    dtype: str
    top: float
    group: int = 0
    scales: tuple[str, ...] = FLOATS
    multiple: int = 1


FORMATS: Mapping[str, ComfyFormat] = {
    "float8_e4m3fn": ComfyFormat("F8_E4M3", "F8_E4M3", 448),
    "float8_e5m2": ComfyFormat("F8_E5M2", "F8_E5M2", 57344),
    "int8_tensorwise": ComfyFormat("I8", "INT8", 127),
    "mxfp8": ComfyFormat("F8_E4M3", "F8_E4M3", 448, 32, ("U8", "F8_E8M0"), multiple=32),
    "nvfp4": ComfyFormat("U8", "FP4", 6, 16, ("F8_E4M3",), multiple=16),
}

# The formats by the names that users choose them by.
CHOICES: Mapping[str, str] = {
    "FP8": "float8_e4m3fn",
    "FP8_E5M2": "float8_e5m2",
    "INT8": "int8_tensorwise",
    "MXFP8": "mxfp8",
    "NVFP4": "nvfp4",
}


def tiled_size(rows: int, columns: int) -> int:
    """Return how many factors are stored for `rows` of `columns` factors each, in whole tiles."""
    return math.prod(-(-size // step) * step for size, step in zip((rows, columns), TILE, strict=True))
