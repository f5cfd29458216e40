"""Compares an array with its reference: error figures, and whether they are within a tolerance.

Arrays are read in slices, so the memory that a comparison takes does not grow with them. Every sum is in float64, in
which squares of float32 values neither overflow nor vanish.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.errors import ParityError
from ..schemas.precision import Precision
from .comparison import Comparison, Subject
from .value_counts import Histogram, Largest, SpecialCounts, ulp_distance

SLICE = 1 << 13  # values at a time: scratch arrays that stay in a core's cache; larger ones are paged in anew each time

Array = NDArray[Any]


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
    if found.shape != reference.shape:
        raise ParityError(
            f"{subject.name}: expected shape {list(reference.shape)} as the reference, found {list(found.shape)}; "
            "export the bundle again"
        )
    extent = _extent(found, reference)
    sums = _Sums(found.size, extent.rms, ulp_of)
    specials = SpecialCounts()
    for start, x, r in _slices(found, reference):
        specials.add(start, x, r)
        sums.add(start, x, r)
    return _comparison(subject, found.shape, tolerance, sums, specials, extent=extent)


def relative_l2(found: Array, reference: Array) -> float:
    """‖x - r‖ / ‖r‖ alone, which takes a tenth of the time of `compare`; NaN when any value is NaN.

    Shapes must be equal."""
    error = norm = 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for _, x, r in _slices(found, reference):
            norm += float(r @ r)
            r -= x
            error += float(r @ r)
    return _ratio(math.sqrt(error), math.sqrt(norm))


@dataclass(frozen=True)
class _Extent:
    """The largest magnitudes of two arrays, and the root mean square of the reference, over values finite in both."""

    found_max: float
    reference_max: float
    rms: float
    constant: bool  # only the found array is


def _extent(found: Array, reference: Array) -> _Extent:
    peaks, equal = [0.0, 0.0], [found.size > 1, found.size > 1]
    firsts = [array.flat[0] if array.size else 0.0 for array in (found, reference)]
    squares, count = 0.0, 0
    for _, *pair in _slices(found, reference):
        for index, values in enumerate(pair):
            equal[index] = equal[index] and bool((values == firsts[index]).all())
        finite_x, finite_r = _finite_pair(*pair)
        squares, count = squares + float(finite_r @ finite_r), count + finite_r.size
        peaks = [max(peak, _peak(values)) for peak, values in zip(peaks, (finite_x, finite_r), strict=True)]
    rms = math.sqrt(squares / max(count, 1))
    return _Extent(found_max=peaks[0], reference_max=peaks[1], rms=rms, constant=equal[0] and not equal[1])


def _peak(values: Array) -> float:
    return float(max(values.max(initial=0), -values.min(initial=0)))


class _Sums:
    """Figures that add up over slices. `worst` is the largest error and its flat index."""

    def __init__(self, size: int, rms: float, ulp_of: Precision | None) -> None:
        self.unit, self.ulp_of = rms or 1.0, ulp_of
        self.count = self.count_rel = self.off_zero = 0
        self.squares_x = self.squares_r = self.squares_error = self.dot = 0.0
        self.total_abs = self.total_rel = self.max_rel = 0.0
        self.worst: tuple[float, int | None] = (-1.0, None)
        self.largest_abs, self.largest_rel = Largest(size), Largest(size)
        self.ulp_max, self.ulp_total = 0, 0
        self.histogram = Histogram()

    def add(self, start: int, x: Array, r: Array) -> None:
        """`x` and `r` are of equal size, float64, and start at the flat index `start`."""
        finite = np.isfinite(x) & np.isfinite(r)
        places = None if finite.all() else np.flatnonzero(finite)
        if places is not None:
            x, r = x[places], r[places]
        if not x.size:
            return
        error = np.abs(x - r)
        self.squares_x += float(x @ x)
        self.squares_r += float(r @ r)
        self.dot += float(x @ r)
        self.squares_error += float(error @ error)
        self.total_abs += float(error.sum())
        self.largest_abs.add(error)
        peak = int(error.argmax())
        if error[peak] > self.worst[0]:
            self.worst = (float(error[peak]), start + (peak if places is None else int(places[peak])))
        self._relative(x, r, error)
        self.histogram = self.histogram.added(error, self.unit)
        if self.ulp_of is not None:
            distance = ulp_distance(x, r, self.ulp_of)
            self.ulp_max = max(self.ulp_max, int(distance.max()))
            self.ulp_total += int(distance.sum())
        self.count += x.size

    def _relative(self, x: Array, r: Array, error: Array) -> None:
        size = np.abs(r)
        if not size.all():
            zero = size == 0
            self.off_zero += int(np.count_nonzero(x[zero]))
            size, error = size[~zero], error[~zero]
        with np.errstate(over="ignore"):
            relative = error / size
        self.total_rel += float(relative.sum())
        self.max_rel = max(self.max_rel, float(relative.max(initial=0)))
        self.largest_rel.add(relative)
        self.count_rel += relative.size


def _comparison(
    subject: Subject, shape: tuple[int, ...], tolerance: float, sums: _Sums, specials: SpecialCounts, *, extent: _Extent
) -> Comparison:
    norm_x, norm_r = math.sqrt(sums.squares_x), math.sqrt(sums.squares_r)
    relative = _ratio(math.sqrt(sums.squares_error), norm_r)
    ulp = sums.ulp_of is not None
    return Comparison(
        **vars(subject),
        shape=shape,
        max_abs=max(sums.worst[0], 0.0),
        mean_abs=sums.total_abs / max(sums.count, 1),
        relative_l2=relative,
        cosine=sums.dot / (norm_x * norm_r) if norm_x * norm_r else float(norm_x == norm_r),
        nonfinite=specials.nan.count + specials.positive.count + specials.negative.count,
        constant=extent.constant,
        tolerance=tolerance,
        p999_abs=sums.largest_abs.quantile(sums.count),
        max_rel=sums.max_rel,
        mean_rel=sums.total_rel / max(sums.count_rel, 1),
        p999_rel=sums.largest_rel.quantile(sums.count_rel),
        off_zero=sums.off_zero,
        snr_db=_decibels(relative),
        ulp_max=sums.ulp_max if ulp else None,
        ulp_mean=sums.ulp_total / max(sums.count, 1) if ulp else None,
        ulp_of=sums.ulp_of,
        reference_rms=extent.rms,
        reference_max=extent.reference_max,
        found_max=extent.found_max,
        nan=specials.nan.at(shape),
        positive_infinity=specials.positive.at(shape),
        negative_infinity=specials.negative.at(shape),
        beyond_fp16=specials.beyond_fp16.at(shape),
        reference_nonfinite=specials.reference.at(shape),
        worst=None if sums.worst[1] is None else tuple(map(int, np.unravel_index(sums.worst[1], shape))),
        histogram=sums.histogram,
    )


def _slices(found: Array, reference: Array) -> Iterator[tuple[int, Array, Array]]:
    """Yield for each slice the flat index of its first value, and float64 copies of the values of both arrays."""
    # numpy's flat iterator walks any strides without a copy of the whole array.
    sources = [array.reshape(-1) if array.flags.c_contiguous else array.flat for array in (found, reference)]
    for start in range(0, found.size, SLICE):
        x, r = (np.array(source[start : start + SLICE], np.float64) for source in sources)
        yield start, x, r


def _finite_pair(x: Array, r: Array) -> tuple[Array, Array]:
    finite = np.isfinite(x) & np.isfinite(r)
    return (x, r) if finite.all() else (x[finite], r[finite])


def _decibels(relative: float) -> float:
    if math.isnan(relative):
        return math.nan
    return math.inf if relative == 0 else -math.inf if math.isinf(relative) else -20 * math.log10(relative)


def _ratio(value: float, norm: float) -> float:
    """value / norm; 0 / 0 is 0, and anything else over 0 is infinite."""
    if norm:
        return value / norm
    return 0.0 if value == 0 else value * math.inf
