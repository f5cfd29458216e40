"""What may differ between two graphs of one network."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...schemas.precision import Precision, Target
from ...schemas.quantization import Quantization, Scheme


@dataclass(frozen=True)
class GraphOptions:
    """How a graph computes.

    `precision` is what it computes in and `target` whose operators it may use. `exponents` gives a stream of
    ``schemas.unet_blocks`` the exponent k: it then carries 2^-k of its values, the same function with a smaller
    range. `fp32_blocks` are residual blocks whose perceptron computes in fp32 whatever the precision.
    `control` are the residual blocks, counted in the order they run, that take a ControlNet's residual as an input.
    With `probes` the graph has outputs ``NAME/max``, the largest magnitude of a value, for calibration.
    The modules `quantized` have their weights as `quantization` says, with `block_size` and `int8_products` as in
    ``schemas.quantization.Scheme``. `activation_ranges` gives modules in fp8 the largest magnitude of what goes into
    them, which is fp8 then too; beyond it values saturate.
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
    activation_ranges: Mapping[str, float] = field(default_factory=dict)

    @property
    def scheme(self) -> Scheme:
        """Raises UsageError for what does not go together."""
        return Scheme(self.quantization, self.target, self.block_size, self.int8_products)
