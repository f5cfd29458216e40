"""How far an engine may be from the reference: a factor times a floor that is measured on the very model.

The floor is the error of the reference itself when it computes in the engine's precision, against itself in float64.
Quantised stages have a second one: that of the reference when its Linears multiply what the graph's do.
docs/parity.md has what the factors come from; `cascadekit bench parity` measures it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..schemas.bundle import StageEntry
from ..schemas.precision import Precision
from ..schemas.quantization import Quantization

COARSENESS = (Precision.FP32, Precision.FP16, Precision.BF16)
# Half the distance of a type's numbers, relative to them.
ROUNDOFF: Mapping[Precision, float] = {Precision.FP32: 2.0**-24, Precision.FP16: 2.0**-11, Precision.BF16: 2.0**-8}

# Tolerance over floor, by what computes and in which precision; "" is any other engine.
FACTORS: Mapping[str, Mapping[Precision, float]] = {
    "": {Precision.FP32: 4.0, Precision.FP16: 3.0, Precision.BF16: 3.0},
}
QUANTIZED_FACTOR = 4.0  # to the error of the reference with every Linear quantised that may be
MOST = 0.5  # relative L2 of a quantised stage, however much the reference loses
# What is measured of a reference, and "float64".
COMPUTES: Mapping[Precision | Quantization, str] = {
    Precision.FP32: "float32",
    Precision.FP16: "float16",
    Precision.BF16: "bfloat16",
    **{kind: str(kind) for kind in Quantization if kind is not Quantization.NONE},
}
# For a reference that computes in one way only: what the tiny cascade's worst stage has. Quantised stages are held to
# about three times what small random networks lose.
USUAL_FLOORS: Mapping[Precision | Quantization, float] = {
    Precision.FP32: 1e-6,
    Precision.FP16: 2e-3,
    Precision.BF16: 2e-2,
    Quantization.NONE: 0.0,
    Quantization.INT8: 0.05 / QUANTIZED_FACTOR,
    Quantization.INT8_DYNAMIC: 0.15 / QUANTIZED_FACTOR,
    Quantization.FP8: 0.1 / QUANTIZED_FACTOR,
    Quantization.INT4: 0.5 / QUANTIZED_FACTOR,
}

Floors = Mapping[Precision | Quantization, float]


@dataclass(frozen=True)
class Preset:
    """What a stage is held to on an engine: relative L2 of one forward pass, and how that came about."""

    precision: Precision
    quantization: Quantization
    floor: float
    factor: float
    quantized_floor: float = 0.0

    @property
    def tolerance(self) -> float:
        return max(self.floor * self.factor, min(self.quantized_floor * QUANTIZED_FACTOR, MOST))


def coarser(precision: Precision, other: Precision | None) -> Precision:
    return max(precision, other or precision, key=COARSENESS.index)


def preset(entry: StageEntry, engine: str, computes: Precision | None, floors: Floors) -> Preset:
    """The preset for a stage of a bundle; `computes` is what the engine computes in whatever the graph says, `floors`
    are the measured ones."""
    precision = coarser(entry.precision, computes)
    floor = floors.get(precision, USUAL_FLOORS[precision])
    if not math.isfinite(floor):  # the reference itself overflows there; graphs that do not are as good as in bf16
        floor = floors.get(Precision.BF16, USUAL_FLOORS[Precision.BF16])
    factors = FACTORS.get(engine, FACTORS[""])
    quantized = floors.get(entry.quantization, USUAL_FLOORS[entry.quantization])
    return Preset(precision, entry.quantization, max(floor, ROUNDOFF[precision]), factors[precision], quantized)


def drift_tolerance(gain: float, tolerance: float) -> float:
    """Relative L2 that a value far down a trajectory may have when each forward pass may have `tolerance`."""
    return max(gain, 1.0) * tolerance


def psnr_needed(image: np.ndarray, tolerance: float) -> float:
    """The PSNR in dB of an image in 0..1 with a relative L2 error of `tolerance`."""
    error = tolerance * float(np.sqrt(np.mean(np.square(image, dtype=np.float64))))
    return -20 * math.log10(error) if error > 0 else math.inf
