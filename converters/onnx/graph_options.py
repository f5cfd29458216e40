"""The options by which two graphs of one network may differ."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...schemas.precision import Precision, Target
from ...schemas.quantization import Quantization, Scheme

OPSET = 20  # the first opset with Gelu; LayerNormalization and Split by parts are older
BLOCKED_OPSET = 21  # the first opset with 4-bit types and with scales by block
BF16_OPSET = 22  # the first opset with convolutions in bf16
ATTENTION_OPSET = 23  # the first opset with Attention, for TensorRT


@dataclass(frozen=True)
class GraphOptions:
    """How the graphs of one network compute.

    `export` derives them from its `ExportOptions` and the weights, see ``converters.export.derive_graph_options``.

    Attributes:
        precision: The type that the graph computes in; ports stay float32.
        target: The runtime whose operators the graph may use.
        exponents: Stream of ``schemas.unet_blocks`` -> k: the stream holds 2^-k of its values, the same function.
        fp32_blocks: Residual blocks whose perceptron computes in fp32 in every precision.
        control: Residual blocks, in running order, that take a ControlNet's residual as an input.
        probes: Whether there are outputs ``NAME/max``, the largest magnitude of a value, for calibration.
        quantization: How the weights of the modules in `quantized` are stored.
        quantized: Modules (Linears) with quantised weights.
        block_size, int8_products: As in ``schemas.quantization.Scheme``.
    """

    precision: Precision = Precision.FP32
    target: Target = Target.PORTABLE
    exponents: Mapping[str, int] = field(default_factory=dict)
    fp32_blocks: frozenset[str] = frozenset()
    control: tuple[int, ...] = ()
    probes: bool = False
    quantization: Quantization = Quantization.NONE
    quantized: frozenset[str] = frozenset()
    block_size: int = 32
    int8_products: bool = False

    @property
    def scheme(self) -> Scheme:
        """How quantised weights are stored. Raises UsageError for a kind, target and block size that do not match."""
        return Scheme(self.quantization, self.target, self.block_size, self.int8_products)

    @property
    def cuda_bf16(self) -> bool:
        """Whether ONNX Runtime's CUDA provider may run the graph in bf16, for which it lacks some operators: Clip,
        ConvTranspose, DepthToSpace, GlobalAveragePool, LeakyRelu, Pad and Resize."""
        return self.precision is Precision.BF16 and self.target is not Target.TENSORRT

    @property
    def between(self) -> str:
        """The dtype of keys and values between a conditioning and a step graph. ONNX Runtime keeps them on the GPU, so
        that graphs for it need no casts."""
        return self.precision.dtype if self.target is Target.ORT else "float32"

    @property
    def modulation_rows(self) -> int | str:
        """Rows of `modulation` in a step graph. One row for all samples can be added in ONNX Runtime's norm."""
        return 1 if self.target is Target.ORT else "batch"

    @property
    def opset(self) -> int:
        """The lowest opset that has every operator and type of graphs with these options."""
        if self.target is Target.TENSORRT:
            return ATTENTION_OPSET
        precision = BF16_OPSET if self.precision is Precision.BF16 else OPSET
        blocked = self.scheme.blockwise and not self.scheme.packed
        return max(precision, BLOCKED_OPSET if blocked else 0)
