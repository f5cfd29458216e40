"""How far a result is from the one it should be, as numbers and as a verdict.

Arrays are read in slices and every sum is in float64, so that a tensor of any size takes next to nothing beside
itself and values of any size neither overflow nor vanish when they are squared.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.errors import ParityError
from ..schemas.precision import Precision
from .image_metrics import psnr, ssim
from .value_counts import BINS_PER_DECADE, HISTOGRAM_EDGES, Histogram, Largest, Specials, Tally, ulp_distance

__all__ = ["BINS_PER_DECADE", "HISTOGRAM_EDGES", "Comparison", "Histogram", "Tally", "compare", "psnr", "ssim"]

SLICE = 1 << 13  # values at a time: scratch arrays that stay in a core's cache; larger ones are paged in anew each time

Array = NDArray[Any]


@dataclass(frozen=True)
class Comparison:
    """One tensor against its reference; true when it passed.

    It fails when its relative L2 error is above `tolerance`, when either holds NaN or infinity, and when it is
    constant although the reference is not (a black image is wrong at any tolerance). Errors are of the values that
    are finite in both. Relative errors are |x - r| / |r| where r is not zero; where it is zero they have no meaning,
    and `off_zero` counts the x that are not zero there."""

    name: str
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
    ulp_max: int | None  # distance in representable values of `ulp_of`; None when that is
    ulp_mean: float | None
    ulp_of: Precision | None
    reference_rms: float
    reference_max: float  # max |r|
    found_max: float  # max |x| of the finite ones
    nan: Tally
    positive_infinity: Tally
    negative_infinity: Tally
    beyond_fp16: Tally  # finite, but above 65504 in magnitude
    reference_nonfinite: Tally
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


def compare(name: str, found: Array, reference: Array, tolerance: float, ulp_of: Precision | None = None) -> Comparison:
    """Compare two arrays of one shape, of any float types. With `ulp_of` also count how many values of that type lie
    between each pair, both rounded to it. Raises ParityError when the shapes differ."""
    if found.shape != reference.shape:
        raise ParityError(f"{name}: expected shape {list(reference.shape)} as the reference, found {list(found.shape)}")
    scales = _scales(found, reference)
    sums = _Sums(found.size, scales, ulp_of)
    specials = Specials()
    for start, x, r in _slices(found, reference):
        specials.add(start, x, r)
        sums.add(start, x, r)
    return _comparison(name, found, reference, tolerance, scales, sums, specials)


def relative_l2(found: Array, reference: Array) -> float:
    """‖x - r‖ / ‖r‖ alone, a tenth of the work of `compare`; NaN when any value is. Shapes must be equal."""
    error = norm = 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for _, x, r in _slices(found, reference):
            norm += float(r @ r)
            r -= x
            error += float(r @ r)
    return _ratio(math.sqrt(error), math.sqrt(norm))


@dataclass(frozen=True)
class _Scales:
    """What has to be known of two arrays before they are compared: exponents of two that bring the largest value of
    each, and of both, below 1; the reference's root mean square; the largest magnitudes. Exponents are zero where
    squares stay in float64's range anyway, which is always so for float32."""

    found: int
    reference: int
    both: int
    rms: float
    found_max: float
    reference_max: float
    constant: bool  # only the found array is


def _scales(found: Array, reference: Array) -> _Scales:
    peaks, equal = [0.0, 0.0], [found.size > 1, found.size > 1]
    firsts = [array.flat[0] if array.size else 0.0 for array in (found, reference)]
    squares, count = 0.0, 0
    with np.errstate(over="ignore", invalid="ignore"):
        for _, *pair in _slices(found, reference):
            for index, values in enumerate(pair):
                equal[index] = equal[index] and bool((values == firsts[index]).all())
            finite_x, finite_r = _finite_pair(*pair)
            squares, count = squares + float(finite_r @ finite_r), count + finite_r.size
            peaks = [max(peak, _peak(values)) for peak, values in zip(peaks, (finite_x, finite_r), strict=True)]
    exponents = [_exponent(peak) for peak in peaks]
    if exponents[1]:
        scaled = (_scale(_finite_pair(*pair)[1], exponents[1]) for _, *pair in _slices(found, reference))
        squares = sum(float(r @ r) for r in scaled)
    both = max(exponents) if any(exponents) else 0
    rms = _unscale(math.sqrt(squares / max(count, 1)), exponents[1])
    return _Scales(exponents[0], exponents[1], both, rms, peaks[0], peaks[1], equal[0] and not equal[1])


def _peak(values: Array) -> float:
    return float(max(values.max(initial=0), -values.min(initial=0)))


def _exponent(peak: float) -> int:
    return 0 if peak == 0 or 2.0**-400 < peak < 2.0**400 else math.frexp(peak)[1]


class _Sums:
    """Everything that adds up over slices. `at` in `worst` is a flat index."""

    def __init__(self, size: int, scales: _Scales, ulp_of: Precision | None) -> None:
        self.scales, self.ulp_of = scales, ulp_of
        self.unit = scales.rms or 1.0
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
        scaled = _scale(x, self.scales.both)
        error = np.abs(scaled - _scale(r, self.scales.both))
        self._norms(x, r, error)
        with np.errstate(over="ignore"):  # what two of float64's largest differ by
            error = np.ldexp(error, self.scales.both) if self.scales.both else error
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

    def _norms(self, x: Array, r: Array, error: Array) -> None:
        x, r = _scale(x, self.scales.found), _scale(r, self.scales.reference)
        self.squares_x += float(x @ x)
        self.squares_r += float(r @ r)
        self.dot += float(x @ r)
        self.squares_error += float(error @ error)

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
    name: str,
    found: Array,
    reference: Array,
    tolerance: float,
    scales: _Scales,
    sums: _Sums,
    specials: Specials,
) -> Comparison:
    norm_x, norm_r = math.sqrt(sums.squares_x), math.sqrt(sums.squares_r)
    error = math.sqrt(sums.squares_error)
    relative = _ratio(_unscale(error, scales.both - scales.reference), norm_r)
    ulp = sums.ulp_of is not None
    return Comparison(
        name=name,
        shape=found.shape,
        max_abs=max(sums.worst[0], 0.0),
        mean_abs=sums.total_abs / max(sums.count, 1),
        relative_l2=relative,
        cosine=sums.dot / (norm_x * norm_r) if norm_x * norm_r else float(norm_x == norm_r),
        nonfinite=specials.nan.count + specials.positive.count + specials.negative.count,
        constant=scales.constant,
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
        reference_rms=scales.rms,
        reference_max=scales.reference_max,
        found_max=scales.found_max,
        nan=specials.nan.at(found.shape),
        positive_infinity=specials.positive.at(found.shape),
        negative_infinity=specials.negative.at(found.shape),
        beyond_fp16=specials.beyond_fp16.at(found.shape),
        reference_nonfinite=specials.reference.at(found.shape),
        worst=None if sums.worst[1] is None else tuple(map(int, np.unravel_index(sums.worst[1], found.shape))),
        histogram=sums.histogram,
    )


def _slices(found: Array, reference: Array) -> Iterator[tuple[int, Array, Array]]:
    """Flat index of the first value, and copies of the values of both in float64."""
    # An iterator of numpy's walks any strides without a copy of the whole array.
    sources = [array.reshape(-1) if array.flags.c_contiguous else array.flat for array in (found, reference)]
    for start in range(0, found.size, SLICE):
        x, r = (np.array(source[start : start + SLICE], np.float64) for source in sources)
        yield start, x, r


def _finite_pair(x: Array, r: Array) -> tuple[Array, Array]:
    finite = np.isfinite(x) & np.isfinite(r)
    return (x, r) if finite.all() else (x[finite], r[finite])


def _scale(values: Array, exponent: int) -> Array:
    return np.ldexp(values, -exponent) if exponent else values


def _unscale(value: float, exponent: int) -> float:
    try:
        return math.ldexp(value, exponent)
    except OverflowError:
        return math.inf


def _decibels(relative: float) -> float:
    if math.isnan(relative):
        return math.nan
    return math.inf if relative == 0 else -math.inf if math.isinf(relative) else -20 * math.log10(relative)


def _ratio(value: float, norm: float) -> float:
    """value / norm, where nothing over nothing is nothing."""
    if norm:
        return value / norm
    return 0.0 if value == 0 else value * math.inf
