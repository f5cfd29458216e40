"""Weights of Linears in 8 and 4 bits: the Linears that may have them, and the tensors that hold them."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from .errors import UsageError
from .precision import Target
from .stages import Stage
from .tensors import Shape


class Quantization(StrEnum):
    """How the weights of a graph's Linears are stored.

    | kind | scales | activations | made for |
    |---|---|---|---|
    | INT8, INT4 | one per block of a row | float | disk and memory; ONNX Runtime's MatMulNBits |
    | INT8_DYNAMIC | one per row (output channel) | 8-bit integers, one scale for all | CPUs with VNNI |
    | FP8 (E4M3) | one per row | float | TensorRT from sm89 on |

    CPUs without VNNI may add two products of INT8_DYNAMIC in 16 bits, which saturates."""

    NONE = "none"
    INT8 = "int8"
    INT4 = "int4"
    INT8_DYNAMIC = "int8-dynamic"
    FP8 = "fp8"


# A quantised Linear may have this many times the error that rounding causes on normal numbers. A larger error means
# that a few outliers decide the scale of all other values.
TOLERATED = 2.0
BLOCK_SIZES = (32, 64, 128)
BLOCKWISE = frozenset({Quantization.INT8, Quantization.INT4})

# TensorRT has no MatMulInteger. ONNX Runtime's CPU kernels gain nothing from fp8, but its standard operators run.
TARGETS: Mapping[Quantization, tuple[Target, ...]] = {
    Quantization.NONE: tuple(Target),
    Quantization.INT8: tuple(Target),
    Quantization.INT4: tuple(Target),
    Quantization.INT8_DYNAMIC: (Target.PORTABLE, Target.ORT),
    Quantization.FP8: (Target.PORTABLE, Target.TENSORRT),
}


@dataclass(frozen=True)
class Scheme:
    """How weights are stored and multiplied in a graph for `target`.

    `block_size` counts columns and matters where `kind` has blocks. With `int8_products` ONNX Runtime's MatMulNBits
    rounds the activations to 8-bit integers too, with a scale for each block of each row, which is faster.

    Raises UsageError for values that do not go together."""

    kind: Quantization = Quantization.NONE
    target: Target = Target.PORTABLE
    block_size: int = 32
    int8_products: bool = False

    def __post_init__(self) -> None:
        if self.target not in TARGETS[self.kind]:
            able = ", ".join(TARGETS[self.kind])
            raise UsageError(f"quantization {self.kind}: target {self.target} cannot run it; expected target {able}")
        if self.block_size not in BLOCK_SIZES:
            sizes = ", ".join(map(str, BLOCK_SIZES))
            raise UsageError(f"block_size={self.block_size}: expected one of {sizes}")
        if self.int8_products and not self.packed:
            raise UsageError('int8_products=True needs kind="int8" or kind="int4" with target="ort"')

    @property
    def bits(self) -> int:
        return 4 if self.kind is Quantization.INT4 else 8

    @property
    def blockwise(self) -> bool:
        return self.kind in BLOCKWISE

    @property
    def packed(self) -> bool:
        """True when weights are stored in the format of MatMulNBits, where scales may be negative."""
        return self.blockwise and self.target is Target.ORT

    def fits(self, columns: int) -> bool:
        """True when matrices with this many columns can be stored; MatMulNBits alone takes half a block."""
        return self.packed or not self.blockwise or columns % self.block_size == 0


# The schemes of bundles. ONNX Runtime's CPU kernels are faster than fp32 only with integer activations. Long blocks
# cost 8-bit weights almost no accuracy and are faster. fp8 uses standard operators that ONNX Runtime runs and TensorRT
# compiles.
BUNDLE_SCHEMES: Mapping[Quantization, Scheme] = {
    Quantization.INT8: Scheme(Quantization.INT8, Target.ORT, block_size=128, int8_products=True),
    Quantization.INT4: Scheme(Quantization.INT4, Target.ORT, block_size=32, int8_products=True),
    Quantization.INT8_DYNAMIC: Scheme(Quantization.INT8_DYNAMIC, Target.ORT),
    Quantization.FP8: Scheme(Quantization.FP8, Target.PORTABLE),
}


def bundle_scheme(kind: Quantization, target: Target) -> Scheme:
    """Return the scheme of a bundle for `target` that is quantised in `kind`.

    For the portable target, which is the default, BUNDLE_SCHEMES decides the operators. Raises UsageError for a target
    that has no operators for `kind`."""
    scheme = BUNDLE_SCHEMES[kind]
    if target is Target.PORTABLE:
        return scheme
    return replace(scheme, target=target, int8_products=scheme.int8_products and target is Target.ORT)


@dataclass(frozen=True)
class StoredTensor:
    """The dtype, in safetensors' spelling, and shape of a tensor."""

    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (4 if self.dtype == "F32" else 1)


def quantized_name(module: str) -> str:
    return f"{module}.weight_quantized"


def scale_name(module: str) -> str:
    return f"{module}.weight_scale"


def stored_tensors(scheme: Scheme, module: str, rows: int, columns: int) -> dict[str, StoredTensor]:
    """The stored tensors that replace the weight (rows, columns) of `module`: values first, then scales.

    | kind | operator | values |
    |---|---|---|
    | int8, int4 | MatMulNBits | U8 (rows, blocks, bytes of a block), unsigned: the value plus 2^(bits-1) |
    | int8 | DequantizeLinear | I8 (rows, columns) |
    | int4 | DequantizeLinear | U8 (rows, columns / 2), two's complements |
    | int8-dynamic | MatMulInteger | I8 (columns, rows) |
    | fp8 | DequantizeLinear | F8_E4M3 (rows, columns) |

    The first of two 4-bit values in a byte has the lower bits. The last block of MatMulNBits is padded with the code of
    zero. Scales are F32, (rows, blocks) for kinds with blocks, else (rows,)."""
    blocks = -(-columns // scheme.block_size)
    values = {
        Quantization.INT8: StoredTensor("I8", (rows, columns)),
        Quantization.INT4: StoredTensor("U8", (rows, columns // 2)),
        Quantization.INT8_DYNAMIC: StoredTensor("I8", (columns, rows)),
        Quantization.FP8: StoredTensor("F8_E4M3", (rows, columns)),
    }[scheme.kind]
    if scheme.packed:
        values = StoredTensor("U8", (rows, blocks, scheme.block_size * scheme.bits // 8))
    scale = StoredTensor("F32", (rows, blocks) if scheme.blockwise else (rows,))
    return {quantized_name(module): values, scale_name(module): scale}


_UNET = (
    (r".*\.channelwise\.[04]|.*\.attention\.(to_[qkv]|to_out\.0)|.*\.kv_mapper\.1", None),
    (r"embedding\.1|clf\.1", "reads or writes the latents: small, and its error reaches all of them"),
    (r".*\.mapper(_\w+)?", "timestep mapper: small, and its error scales whole blocks"),
    (r"clip_\w+_mapper", "makes the conditioning of every block: its error is in all of them"),
    (r"(effnet|pixels)_mapper\.[02]", "its output is added to the embedding: its error is in every block"),
    (r"\w+_repeat_mappers\..*|\w+scalers\..*", "the stream itself goes through it, not a part that is added"),
)
# All decoders have four levels. The deeper ones are too coarse for the finest part of the noise that is predicted.
_DECODER = (
    (r"up_blocks\.3\.\d+\.channelwise\.[04]", "the outermost level: small, and the output has all of its error"),
    *_UNET,
)
_CLIP = (
    (r".*\.self_attn\.\w+_proj|.*\.mlp\.fc[12]", None),
    (r"\w+_projection", "makes the pooled embedding from one row: small, and there is nothing after it"),
)

# Patterns of modules -> why the weight stays float, or None when it may be quantised. The first that fits counts.
RULES: Mapping[Stage, tuple[tuple[str, str | None], ...]] = {
    Stage.PRIOR: _UNET,
    Stage.DECODER: _DECODER,
    Stage.TEXT_ENCODER: _CLIP,
    Stage.IMAGE_ENCODER: _CLIP,
}


def linears(stage: Stage, expected: Mapping[str, Shape]) -> Iterator[tuple[str, Shape, str | None]]:
    """The Linears among the tensors `expected`: name, (rows, columns), and why the weight stays float.

    The reason is None where the weight may be quantised. Networks without rules have no such Linears."""
    for name, shape in expected.items():
        module, _, part = name.rpartition(".")
        if part != "weight" or len(shape) < 2 or math.prod(shape[2:]) != 1:
            continue
        for pattern, reason in RULES.get(stage, ()):
            if re.fullmatch(pattern, module):
                yield module, shape[:2], reason
                break


def candidates(stage: Stage, expected: Mapping[str, Shape]) -> dict[str, Shape]:
    """The modules that may be quantised, and the (rows, columns) of their weights."""
    return {module: shape for module, shape, reason in linears(stage, expected) if reason is None}
