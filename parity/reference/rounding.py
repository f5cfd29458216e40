"""The products of quantised graphs in PyTorch: weights and inputs rounded to integers or to E4M3.

Integers are rounded as by ONNX Runtime's CPU kernels (docs/ContribOperators.md of ONNX Runtime: MatMulNBits; ONNX:
DynamicQuantizeLinear), fp8 as by TensorRT. The code shares nothing with `converters.export`, whose graphs are compared
with it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from ...schemas.precision import E4M3_MAX
from ...schemas.quantization import BUNDLE_SCHEMES, Quantization

Round = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Rounding:
    """How a weight (rows, columns) is rounded, and how the inputs (..., columns) are that it is multiplied with."""

    weight: Round
    inputs: Round


def _over(part: torch.Tensor, whole: torch.Tensor | float) -> torch.Tensor:
    """Scales; 1 where all values are zero."""
    scale = part / whole
    return torch.where(scale == 0, 1.0, scale)


def _blocked(tensor: torch.Tensor, size: int, bits: int | None = None) -> torch.Tensor:
    """Round to integers of `bits` bits with a scale for each block of columns.

    The value of largest magnitude becomes -2^(bits-1). Without `bits`, as for inputs, it becomes ±127."""
    columns = tensor.shape[-1]
    padded = torch.nn.functional.pad(tensor, (0, -columns % size))
    blocks = padded.view(*padded.shape[:-1], -1, size)
    largest = blocks.abs().amax(-1, keepdim=True)
    if bits is None:
        low, high, scale = -127, 127, _over(largest, 127)
    else:
        half = 1 << bits - 1
        extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        low, high, scale = -half, half - 1, _over(extreme, -half)
    rounded: torch.Tensor = (blocks / scale).round().clamp(low, high) * scale
    return rounded.flatten(-2)[..., :columns]


def _by_row(weight: torch.Tensor) -> torch.Tensor:
    scale = _over(weight.abs().amax(1, keepdim=True), 127)
    return (weight / scale).round() * scale


def _from_low_to_high(inputs: torch.Tensor) -> torch.Tensor:
    """Round to 0..255 between the least and the greatest of all values and zero."""
    low, high = inputs.amin().clamp(max=0), inputs.amax().clamp(min=0)
    scale = _over(high - low, 255)
    middle = (-low / scale).round()
    return ((inputs / scale).round().add(middle).clamp(0, 255) - middle) * scale


def _e4m3(tensor: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """The nearest E4M3 numbers, scaled so that the largest magnitude, of all or along `dim`, is the largest of E4M3."""
    largest = tensor.abs().amax() if dim is None else tensor.abs().amax(dim, keepdim=True)
    scale = _over(largest, E4M3_MAX)
    return (tensor / scale).to(torch.float8_e4m3fn).to(tensor.dtype) * scale


def _by_block(kind: Quantization, bits: int) -> Rounding:
    size = BUNDLE_SCHEMES[kind].block_size
    return Rounding(partial(_blocked, size=size, bits=bits), partial(_blocked, size=size))


ROUNDINGS: Mapping[Quantization, Rounding] = {
    Quantization.INT8: _by_block(Quantization.INT8, 8),
    Quantization.INT4: _by_block(Quantization.INT4, 4),
    Quantization.INT8_DYNAMIC: Rounding(_by_row, _from_low_to_high),
    Quantization.FP8: Rounding(partial(_e4m3, dim=1), _e4m3),
}
