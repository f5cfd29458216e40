"""Products as quantised graphs take them, in PyTorch: weights and inputs rounded to what integers or E4M3 hold.

As ONNX Runtime's CPU kernels compute them (docs/ContribOperators.md of ONNX Runtime: MatMulNBits; ONNX:
DynamicQuantizeLinear), fp8 as TensorRT does. Written apart from `converters.export`, to be compared with what that
makes.
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
    """What stands for a weight (rows, columns), and for what it is multiplied with, (..., columns)."""

    weight: Round
    inputs: Round


def _over(part: torch.Tensor, whole: torch.Tensor | float) -> torch.Tensor:
    """Scales, 1 where there is nothing to scale."""
    scale = part / whole
    return torch.where(scale == 0, 1.0, scale)


def _blocked(tensor: torch.Tensor, size: int, bits: int | None = None) -> torch.Tensor:
    """Integers of so many bits by block of columns, the value of largest magnitude becoming -2^(bits-1); without
    `bits` the largest magnitude becomes 127, as inputs are."""
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
    """0 to 255 between the least and the greatest value of all, 0 among them."""
    low, high = inputs.amin().clamp(max=0), inputs.amax().clamp(min=0)
    scale = _over(high - low, 255)
    middle = (-low / scale).round()
    return ((inputs / scale).round().add(middle).clamp(0, 255) - middle) * scale


def _e4m3(tensor: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """The nearest E4M3 numbers when the largest magnitude, of all or along `dim`, is the largest of them."""
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
