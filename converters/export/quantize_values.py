"""Matrices in 8 and 4 bits: symmetric, rounded to nearest, ties to even.

Every scheme computes q = saturate(round(x / scale)), like ONNX's QuantizeLinear without a zero point. q * scale is the
value that a graph reads (https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html, onnx__DequantizeLinear.html).

| scheme | one scale for | scale |
|---|---|---|
| int8, int4 for MatMulNBits | a block of columns | v / -2^(bits-1), v the value of largest magnitude with its sign |
| int8, int4 for DequantizeLinear | a block of columns | max(largest / (2^(bits-1) - 1), -smallest / 2^(bits-1)) |
| int8-dynamic | a row | largest magnitude / 127 |
| fp8 | a row | largest magnitude / 448 |

The scale of MatMulNBits may be negative and uses every code, like that of ONNX Runtime's own quantiser
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits). TensorRT
requires positive scales of DequantizeLinear. fp8 is E4M3 without infinities (https://arxiv.org/abs/2209.05433).

A block of zeros has scale 1. The last block of a row may be short.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_dtypes import float8_e4m3fn
from numpy.typing import NDArray

from ...schemas.errors import ConversionError
from ...schemas.precision import E4M3_MAX
from ...schemas.quantization import Quantization, Scheme
from ...storage.cast import cast_block

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Quantized:
    """A quantised matrix."""

    values: NDArray[Any]  # (rows, columns) int8, or uint8 with E4M3 patterns
    scale: Floats  # (rows, blocks) for schemes with blocks, else (rows,)


def quantize(matrix: Floats, scheme: Scheme) -> Quantized:
    """Quantise `matrix` (rows, columns) in `scheme`. Raises ConversionError for NaN and infinities."""
    if not np.isfinite(matrix).all():
        raise ConversionError("holds NaN or infinite values, which have no quantised form; leave it in float")
    if scheme.blockwise:
        return _by_block(matrix, scheme)
    limit = E4M3_MAX if scheme.kind is Quantization.FP8 else 127.0
    scale = _usable(np.abs(matrix).max(axis=1) / np.float32(limit))
    quotients = matrix / scale[:, None]
    values = to_e4m3(quotients) if scheme.kind is Quantization.FP8 else _rounded(quotients, 127, 127)
    return Quantized(values, scale)


def dequantize(quantized: Quantized, scheme: Scheme) -> Floats:
    """The weight that the graph computes with, (rows, columns) float32."""
    values = from_e4m3(quantized.values) if scheme.kind is Quantization.FP8 else quantized.values.astype(np.float32)
    scale = quantized.scale
    if scheme.blockwise:
        return values * np.repeat(scale, scheme.block_size, axis=1)[:, : values.shape[1]]
    return values * scale[:, None]


def pack(quantized: Quantized, scheme: Scheme) -> NDArray[Any]:
    """The values as they are stored, see ``schemas.quantization.stored_tensors``."""
    values = quantized.values
    if scheme.kind is Quantization.INT8_DYNAMIC:
        return np.ascontiguousarray(values.T)
    if scheme.packed:
        half = 1 << scheme.bits - 1
        unsigned = (_blocks(values, scheme.block_size).astype(np.int16) + half).astype(np.uint8)
        return _paired(unsigned) if scheme.bits == 4 else unsigned
    return _paired(values.view(np.uint8) & 15) if scheme.kind is Quantization.INT4 else values


def _by_block(matrix: Floats, scheme: Scheme) -> Quantized:
    blocks = _blocks(matrix, scheme.block_size)  # (rows, blocks, block size)
    low, high = blocks.min(axis=2), blocks.max(axis=2)
    half = np.float32(1 << scheme.bits - 1)
    if scheme.packed:
        extreme = np.where(-low > high, low, high)
        scale = _usable(np.asarray(extreme / -half))
    else:
        scale = _usable(np.maximum(high / (half - 1), low / -half))
    values = _rounded(blocks / scale[..., None], int(half), int(half) - 1)
    return Quantized(values.reshape(len(matrix), -1)[:, : matrix.shape[1]], scale)


def _blocks(matrix: NDArray[Any], size: int) -> NDArray[Any]:
    """(rows, columns) -> (rows, blocks, size), padded with zeros."""
    missing = -matrix.shape[1] % size
    padded = np.pad(matrix, ((0, 0), (0, missing))) if missing else matrix
    return padded.reshape(len(matrix), -1, size)


def _rounded(quotients: NDArray[Any], down: int, up: int) -> NDArray[np.int8]:
    return np.asarray(np.clip(np.rint(quotients), -down, up), np.int8)


def _usable(scale: NDArray[Any]) -> Floats:
    """Scales by which one can divide, float32: zeros as 1."""
    usable = scale.astype(np.float32)
    usable[usable == 0] = 1
    return usable


def _paired(nibbles: NDArray[Any]) -> NDArray[np.uint8]:
    """(..., n) values of 4 bits -> (..., n/2) bytes, the first of two in the lower bits."""
    return np.asarray(nibbles[..., 0::2] | nibbles[..., 1::2] << 4, np.uint8)


def to_e4m3(values: Floats) -> NDArray[np.uint8]:
    """The E4M3 patterns nearest to `values`, ties to even; values beyond the largest number become that number."""
    return np.clip(values, -E4M3_MAX, E4M3_MAX).astype(float8_e4m3fn).view(np.uint8)


def from_e4m3(patterns: NDArray[np.uint8]) -> Floats:
    """The numbers of E4M3 `patterns`, float32."""
    return cast_block(np.ascontiguousarray(patterns).data, "F8_E4M3", "F32")[0].reshape(patterns.shape)
