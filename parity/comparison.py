"""The comparison of one array with its reference as data: which array it is, error figures, and whether it passed."""

from dataclasses import dataclass
from enum import StrEnum

from ..schemas.precision import Precision
from ..schemas.stages import Stage
from .value_counts import Histogram, ValueCount


class Kind(StrEnum):
    """The run of a stage that an array comes from."""

    STAGE = "stage"  # one forward pass on sample inputs
    TEACHER_FORCED = "teacher-forced"  # one forward pass on what the reference saw at a step of its trajectory
    TRAJECTORY = "trajectory"  # a step of sampling in which the errors of earlier steps are included
    NOISE = "noise"  # the random numbers that sampling starts from and adds


@dataclass(frozen=True)
class Subject:
    """The array that is compared: its name for people, and the same facts as data."""

    name: str
    kind: Kind = Kind.STAGE
    stage: Stage | None = None  # None for the final image, and for arrays of no stage
    step: int | None = None  # counted from 1; None outside of sampling


@dataclass(frozen=True)
class Comparison:
    """One array compared with its reference; true when it passed.

    A comparison fails when the relative L2 error is above `tolerance`, or when either array holds NaN or infinity. It
    also fails when the array is constant although the reference is not: a black image is wrong at any tolerance.
    Errors are taken over the values that are finite in both arrays. A relative error is |x - r| / |r|. It is not
    defined where r is zero; `off_zero` counts the x that are not zero there."""

    name: str
    kind: Kind
    stage: Stage | None
    step: int | None
    shape: tuple[int, ...]
    max_abs: float  # max |x - r|
    mean_abs: float  # mean |x - r|
    relative_l2: float  # ‖x - r‖ / ‖r‖: the tolerance it would have needed
    cosine: float  # <x, r> / (‖x‖ ‖r‖)
    nonfinite: int  # values that are NaN or infinite
    constant: bool  # all values equal, though the reference's are not
    tolerance: float
    p999_abs: float  # 99.9% of |x - r| are no larger, between two values linearly interpolated
    max_rel: float
    mean_rel: float
    p999_rel: float
    off_zero: int
    snr_db: float  # 10·log10(‖r‖² / ‖x - r‖²), infinite when equal
    ulp_max: int | None  # distance in representable values of `ulp_of`; None without `ulp_of`
    ulp_mean: float | None
    ulp_of: Precision | None
    reference_rms: float
    reference_max: float  # max |r|
    found_max: float  # max |x| of finite values
    nan: ValueCount
    positive_infinity: ValueCount
    negative_infinity: ValueCount
    beyond_fp16: ValueCount  # finite, but above 65504 in magnitude
    reference_nonfinite: ValueCount
    worst: tuple[int, ...] | None  # where |x - r| is largest
    histogram: Histogram  # of |x - r| as a part of the reference's root mean square

    def __bool__(self) -> bool:
        return not self.failures

    def __str__(self) -> str:
        verdict = "; ".join(self.failures) or "ok"
        return (
            f"{self.name} {list(self.shape)}: needs a tolerance of {self.needed:.1e}, has {self.tolerance:.1e}; "
            f"max abs {self.max_abs:.1e}, cosine {self.cosine:.8f}, SNR {self.snr_db:.1f} dB: {verdict}"
        )

    @property
    def needed(self) -> float:
        """The tolerance it would have needed to pass, if all values are finite."""
        return self.relative_l2

    @property
    def failures(self) -> tuple[str, ...]:
        """Why it failed, in a few words each; empty when it passed."""
        reasons = {
            f"{self.nonfinite} values are NaN or infinite": self.nonfinite > 0,
            f"{self.reference_nonfinite.count} values of the reference are NaN or infinite": bool(
                self.reference_nonfinite
            ),
            "the output is constant": self.constant,
            f"relative L2 {self.relative_l2:.1e} above {self.tolerance:.0e}": not self.relative_l2 <= self.tolerance,
        }
        return tuple(reason for reason, failed in reasons.items() if failed)
