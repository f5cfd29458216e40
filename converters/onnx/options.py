"""What may differ between two graphs of one network."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...schemas.precision import Precision, Target


@dataclass(frozen=True)
class GraphOptions:
    """How a graph computes.

    `precision` is what it computes in and `target` whose operators it may use. `exponents` gives a stream of
    ``schemas.unet_blocks`` the exponent k: it then carries 2^-k of its values, the same function with a smaller
    range. `fp32_blocks` are residual blocks whose perceptron computes in fp32 whatever the precision.
    `control` are the residual blocks, counted in the order they run, that take a ControlNet's residual as an input.
    With `probes` the graph has outputs ``NAME/max``, the largest magnitude of a value, for calibration.
    """

    precision: Precision = Precision.FP32
    target: Target = Target.PORTABLE
    exponents: Mapping[str, int] = field(default_factory=dict)
    fp32_blocks: frozenset[str] = frozenset()
    control: tuple[int, ...] = ()
    probes: bool = False
