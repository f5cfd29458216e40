"""How far an engine may be from the reference: a factor times a floor that is measured on the very model.

The floor is the error of the reference itself when it computes in the engine's precision, against itself in float64.
docs/parity.md has what the factors come from; `cascadekit bench parity` measures it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ...schemas.bundle import StageEntry
from ...schemas.precision import Precision
from ...schemas.quantization import Quantization

COARSENESS = (Precision.FP32, Precision.FP16, Precision.BF16)
DTYPES: Mapping[Precision, str] = {
    Precision.FP32: "float32",
    Precision.FP16: "float16",
    Precision.BF16: "bfloat16",
}
# Half the distance of a type's numbers, relative to them.
ROUNDOFF: Mapping[Precision, float] = {Precision.FP32: 2.0**-24, Precision.FP16: 2.0**-11, Precision.BF16: 2.0**-8}

# Tolerance over floor, by what computes and in which precision; "" is any other engine.
FACTORS: Mapping[str, Mapping[Precision, float]] = {
    "": {Precision.FP32: 4.0, Precision.FP16: 3.0, Precision.BF16: 3.0},
}
# Relative L2 that quantised Linears may add: no rounding of the reference's has to do with them. About three times what
# small random networks lose.
QUANTIZED: Mapping[Quantization, float] = {
    Quantization.NONE: 0.0,
    Quantization.INT8: 5e-2,
    Quantization.INT8_DYNAMIC: 0.15,
    Quantization.FP8: 0.1,
    Quantization.INT4: 0.5,
}
# For a reference that computes in one precision only: what the tiny cascade's worst stage has.
USUAL_FLOORS: Mapping[Precision, float] = {Precision.FP32: 1e-6, Precision.FP16: 2e-3, Precision.BF16: 2e-2}


@dataclass(frozen=True)
class Preset:
    """What a stage is held to on an engine: relative L2 of one forward pass, and how that came about."""

    precision: Precision
    quantization: Quantization
    floor: float
    factor: float

    @property
    def tolerance(self) -> float:
        return max(self.floor * self.factor, QUANTIZED[self.quantization])


def coarser(precision: Precision, other: Precision | None) -> Precision:
    return max(precision, other or precision, key=COARSENESS.index)


def preset(entry: StageEntry, engine: str, computes: Precision | None, floors: Mapping[Precision, float]) -> Preset:
    """The preset for a stage of a bundle; `computes` is what the engine computes in whatever the graph says, `floors`
    are the measured ones."""
    precision = coarser(entry.precision, computes)
    floor = floors.get(precision, USUAL_FLOORS[precision])
    if not math.isfinite(floor):  # the reference itself overflows there; graphs that do not are as good as in bf16
        floor = floors.get(Precision.BF16, USUAL_FLOORS[Precision.BF16])
    factors = FACTORS.get(engine, FACTORS[""])
    return Preset(precision, entry.quantization, max(floor, ROUNDOFF[precision]), factors[precision])


def drift_tolerance(gain: float, tolerance: float) -> float:
    """Relative L2 that a value far down a trajectory may have when each forward pass may have `tolerance`."""
    return max(gain, 1.0) * tolerance


def psnr_needed(image: np.ndarray, tolerance: float) -> float:
    """The PSNR in dB of an image in 0..1 with a relative L2 error of `tolerance`."""
    error = tolerance * float(np.sqrt(np.mean(np.square(image, dtype=np.float64))))
    return -20 * math.log10(error) if error > 0 else math.inf
