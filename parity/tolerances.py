"""Decides how far an engine may be from the reference: a factor times an error floor measured on the same model.

The floor is the error of the reference when it computes in the engine's precision, compared with itself in float64.
Quantised stages have a second floor: the error of the reference with Linears that multiply quantised numbers, as those
of the graph do.

`cascadekit bench parity` measures the factors; docs/parity.md explains them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..schemas.manifest import StageEntry
from ..schemas.precision import Precision
from ..schemas.quantization import Quantization

# A note for people beside the PSNR of a quantised bundle's image.
QUANTISED_IMAGE = (
    "Weights are quantised, so the image's PSNR is no measure of faults: small errors grow over the steps, and another "
    "picture of the same prompt may come out. Each forward pass is judged instead, on equal inputs, against the error "
    "that PyTorch itself makes in this format."
)

COARSENESS = (Precision.FP32, Precision.FP16, Precision.BF16)
# Half the distance between neighbouring numbers of a type, relative to the numbers.
ROUNDOFF: Mapping[Precision, float] = {Precision.FP32: 2.0**-24, Precision.FP16: 2.0**-11, Precision.BF16: 2.0**-8}

# Tolerance divided by floor; every engine has the same.
FACTORS: Mapping[Precision, float] = {Precision.FP32: 4.0, Precision.FP16: 3.0, Precision.BF16: 3.0}
QUANTIZED_FACTOR = 4.0  # tolerance divided by the floor of quantised stages
MAX_QUANTIZED_TOLERANCE = 0.5  # relative L2 of a quantised stage, however large its floor is
# The name that a reference knows each precision and quantisation by; floors are errors against "float64".
COMPUTE_DTYPES: Mapping[Precision | Quantization, str] = {
    **{precision: precision.dtype for precision in Precision},
    **{kind: str(kind) for kind in Quantization if kind is not Quantization.NONE},
}
# Floors for a reference that computes in one precision only: those of the tiny cascade's worst stage. Those of
# quantised stages allow about three times what small random networks lose.
DEFAULT_FLOORS: Mapping[Precision | Quantization, float] = {
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
class StageTolerance:
    """The relative L2 that one forward pass of a stage may have on an engine, and the numbers it comes from."""

    precision: Precision
    quantization: Quantization
    floor: float
    factor: float
    quantized_floor: float = 0.0

    @property
    def tolerance(self) -> float:
        return max(self.floor * self.factor, min(self.quantized_floor * QUANTIZED_FACTOR, MAX_QUANTIZED_TOLERANCE))


def coarser(precision: Precision, other: Precision | None) -> Precision:
    """The precision of the two that has fewer significant bits; `precision` when `other` is None."""
    return max(precision, other or precision, key=COARSENESS.index)


def stage_tolerance(entry: StageEntry, computes: Precision | None, floors: Floors) -> StageTolerance:
    """The tolerance for a stage of a bundle.

    `computes` is the precision that the engine computes in whatever the graph says, or None. `floors` are the measured
    ones; DEFAULT_FLOORS stand in for those that are missing."""
    precision = coarser(entry.precision, computes)
    floor = floors.get(precision, DEFAULT_FLOORS[precision])
    if not math.isfinite(floor):  # the reference overflows in fp16: a graph that does not is as exact as one in bf16
        floor = floors.get(Precision.BF16, DEFAULT_FLOORS[Precision.BF16])
    quantized = floors.get(entry.quantization, DEFAULT_FLOORS[entry.quantization])
    return StageTolerance(
        precision, entry.quantization, max(floor, ROUNDOFF[precision]), FACTORS[precision], quantized_floor=quantized
    )


def trajectory_tolerance(gain: float, tolerance: float) -> float:
    """The relative L2 that a value along a trajectory may have when each forward pass may have `tolerance`.

    `gain` is how many times larger than the error of each forward pass the error of that value is."""
    return max(gain, 1.0) * tolerance


def psnr_needed(image: np.ndarray, tolerance: float) -> float:
    """The PSNR in dB of an image in 0..1 with a relative L2 error of `tolerance`."""
    error = tolerance * float(np.sqrt(np.mean(np.square(image, dtype=np.float64))))
    return -20 * math.log10(error) if error > 0 else math.inf
