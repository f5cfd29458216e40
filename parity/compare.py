"""Compares an array with its reference: error figures, and whether they are within a tolerance.

Every sum is in float64, in which squares of float32 values neither overflow nor vanish.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.errors import ParityError
from ..schemas.precision import FP16_MAX, Precision
from ..schemas.report import Comparison
from ..schemas.stages import Stage
from .value_counts import count_values, histogram_of, index_in, ulp_distance

Array = NDArray[Any]


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


def compare(
    subject: Subject | str, found: Array, reference: Array, tolerance: float, ulp_of: Precision | None = None
) -> Comparison:
    """Compare two arrays of one shape; `tolerance` is the largest relative L2 that passes.

    Their dtypes may be any float type; values that only float64 has are too large or too small to be compared.

    `subject` says which array it is; a plain name will do for an array of no stage. With `ulp_of`, also count how many
    values of that type lie between each pair of values, both rounded to it. Raises ParityError when the shapes differ.
    """
    if isinstance(subject, str):
        subject = Subject(subject)
    shape = found.shape
    if shape != reference.shape:
        raise ParityError(
            f"{subject.name}: expected shape {list(reference.shape)} as the reference, found {list(shape)}; "
            "export the bundle again"
        )
    x, r = _flat(found), _flat(reference)
    counts = _special_values(x, r, shape)
    nonfinite = sum(counts[name].count for name in ("nan", "positive_infinity", "negative_infinity"))
    bad = counts["reference_nonfinite"].count
    constant = x.size > 1 and bool((x == x[0]).all()) and not (r == r[0]).all()
    places = None
    if nonfinite or bad:
        places = np.flatnonzero(np.isfinite(x) & np.isfinite(r))
        x, r = x[places], r[places]
    error = np.abs(x - r)
    worst = int(error.argmax()) if error.size else None
    figures = _figures(x, r, error)
    failures = {
        f"{nonfinite} values are NaN or infinite": nonfinite > 0,
        f"{bad} values of the reference are NaN or infinite": bad > 0,
        "the output is constant": constant,
        f"relative L2 {figures['relative_l2']:.1e} above {tolerance:.0e}": not figures["relative_l2"] <= tolerance,
    }
    return Comparison(
        **vars(subject),
        **counts,
        **figures,
        **_relative_errors(x, r, error),
        **_ulps(x, r, ulp_of),
        shape=shape,
        passed=not any(failures.values()),
        failures=tuple(reason for reason, failed in failures.items() if failed),
        tolerance=tolerance,
        constant=constant,
        nonfinite=nonfinite,
        worst=None if worst is None else index_in(shape, worst if places is None else int(places[worst])),
    )


def relative_l2(found: Array, reference: Array) -> float:
    """‖x - r‖ / ‖r‖ alone; infinite when a value is not finite. Shapes must be equal."""
    x, r = _flat(found), _flat(reference)
    with np.errstate(invalid="ignore"):
        value = _ratio(_norm(x - r), _norm(r))
    return value if math.isfinite(value) else math.inf


def _special_values(x: Array, r: Array, shape: tuple[int, ...]) -> dict[str, Any]:
    hits = {
        "nan": np.isnan(x),
        "positive_infinity": x == np.inf,
        "negative_infinity": x == -np.inf,
        "beyond_fp16": np.isfinite(x) & (np.abs(x) > FP16_MAX),
        "reference_nonfinite": ~np.isfinite(r),
    }
    return {name: count_values(found, shape) for name, found in hits.items()}


def _figures(x: Array, r: Array, error: Array) -> dict[str, Any]:
    norm_x, norm_r = _norm(x), _norm(r)
    relative = _ratio(_norm(error), norm_r)
    rms = norm_r / math.sqrt(max(r.size, 1))
    return {
        "max_abs": _peak(error),
        "mean_abs": _mean(error),
        "p999_abs": _p999(error),
        "relative_l2": relative,
        "cosine": float(x @ r) / (norm_x * norm_r) if norm_x * norm_r else float(norm_x == norm_r),
        "snr_db": _decibels(relative),
        "reference_rms": rms,
        "reference_max": _peak(r),
        "found_max": _peak(x),
        "histogram": histogram_of(error, rms or 1.0),
    }


def _relative_errors(x: Array, r: Array, error: Array) -> dict[str, Any]:
    known, size = r != 0, np.abs(r)
    if not known.all():
        error, size = error[known], size[known]
    with np.errstate(over="ignore"):
        relative = np.divide(error, size, out=size)  # in place: arrays may be large
    return {
        "max_rel": _peak(relative),
        "mean_rel": _mean(relative),
        "p999_rel": _p999(relative),
        "off_zero": int(np.count_nonzero(x[~known])),
    }


def _ulps(x: Array, r: Array, precision: Precision | None) -> dict[str, Any]:
    if precision is None:
        return {"ulp_of": None, "ulp_max": None, "ulp_mean": None}
    steps = ulp_distance(x, r, precision)
    return {"ulp_of": precision, "ulp_max": int(_peak(steps)), "ulp_mean": _mean(steps)}


def _flat(array: Array) -> Array:
    return np.asarray(array, np.float64).reshape(-1)


def _norm(values: Array) -> float:
    return math.sqrt(values @ values)


def _peak(values: Array) -> float:
    """The largest magnitude; 0 without values."""
    return float(max(values.max(initial=0), -values.min(initial=0)))


def _mean(values: Array) -> float:
    return float(values.mean()) if values.size else 0.0


def _p999(values: Array) -> float:
    """The 99.9th percentile, interpolated linearly; 0 without values."""
    return float(np.quantile(values, 0.999)) if values.size else 0.0


def _decibels(relative: float) -> float:
    return math.inf if relative == 0 else -math.inf if relative == math.inf else -20 * math.log10(relative)


def _ratio(value: float, norm: float) -> float:
    """value / norm; 0 / 0 is 0, and anything else over 0 is infinite."""
    if norm:
        return value / norm
    return 0.0 if value == 0 else value * math.inf
