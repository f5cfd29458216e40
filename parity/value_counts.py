"""Counts over slices of arrays: special values, the largest errors, a histogram, distances in ULP."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.precision import FP16_MAX, Precision

Array = NDArray[Any]

QUANTILE = 0.999
SPARE = 1 << 13  # values that are added before the small ones are dropped
BINS_PER_DECADE = 4
LOWEST, HIGHEST = -12, 4  # decades of the histogram
BINS = (HIGHEST - LOWEST) * BINS_PER_DECADE
# log10 of the bins' edges, lower ones included.
HISTOGRAM_EDGES = tuple(LOWEST + index / BINS_PER_DECADE for index in range(BINS + 1))


@dataclass(frozen=True)
class ValueCount:
    """How many values are of one kind, and the index of the first; true when there is one."""

    count: int = 0
    first: tuple[int, ...] | None = None

    def __bool__(self) -> bool:
        return self.count > 0


@dataclass
class _Counter:
    """Counts over slices towards a ValueCount; `first` is a flat index."""

    count: int = 0
    first: int = -1

    def add(self, start: int, hits: Array) -> None:
        count = int(np.count_nonzero(hits))
        if count and not self.count:
            self.first = start + int(hits.argmax())
        self.count += count

    def at(self, shape: tuple[int, ...]) -> ValueCount:
        return ValueCount(self.count, tuple(map(int, np.unravel_index(self.first, shape))) if self.count else None)


class SpecialCounts:
    """Counts NaN, infinities and values beyond fp16 in the found array, and non-finite values in the reference."""

    def __init__(self) -> None:
        self.nan, self.positive, self.negative = _Counter(), _Counter(), _Counter()
        self.beyond_fp16, self.reference = _Counter(), _Counter()

    def add(self, start: int, x: Array, r: Array) -> None:
        finite = np.isfinite(x)
        if not finite.all():
            self.nan.add(start, np.isnan(x))
            self.positive.add(start, x == np.inf)
            self.negative.add(start, x == -np.inf)
        self.beyond_fp16.add(start, (np.abs(x) > FP16_MAX) & finite)
        self.reference.add(start, ~np.isfinite(r))


class Largest:
    """Keeps the largest values of a stream of at most `size` values: as many as its exact 99.9th percentile needs."""

    def __init__(self, size: int) -> None:
        self._keep = size - math.floor(QUANTILE * (size - 1)) if size else 0
        self._values = np.empty(2 * self._keep + SPARE)
        self._count = 0
        self._least = -math.inf  # once enough are kept, smaller values are ignored

    def add(self, values: Array) -> None:
        for start in range(0, values.size, SPARE):
            part = values[start : start + SPARE]
            if self._least >= 0:
                part = part[part > self._least]
            if self._count + part.size > self._values.size:
                self._drop()
            self._values[self._count : self._count + part.size] = part
            self._count += part.size

    def _drop(self) -> None:
        """Drop all but the largest values that the percentile can need."""
        self._values[: self._count].partition(self._count - self._keep)
        self._values[: self._keep] = self._values[self._count - self._keep : self._count]
        self._count = self._keep
        self._least = float(self._values[: self._keep].min(initial=math.inf))

    def quantile(self, count: int) -> float:
        """The 99.9th percentile of the `count` values added, interpolated linearly as numpy does; 0 without values."""
        if not count:
            return 0.0
        position = QUANTILE * (count - 1)
        below = math.floor(position)
        ordered = np.sort(self._values[: self._count])[-(count - below) :]
        low, high = float(ordered[0]), float(ordered[min(1, ordered.size - 1)])
        return low if low == high else low + (high - low) * (position - below)


@dataclass(frozen=True)
class Histogram:
    """Errors by size, in quarter decades from 1e-12 to 1e4: `exact` are zero, `below` and `above` lie outside."""

    exact: int = 0
    below: int = 0
    counts: tuple[int, ...] = field(default=(0,) * BINS)
    above: int = 0

    def added(self, error: Array, unit: float) -> "Histogram":
        """This histogram with the values of `error` / `unit` added, none of which may be negative."""
        positive = error[error > 0]
        with np.errstate(over="ignore"):
            scale = np.floor((np.log10(positive) - math.log10(unit) - LOWEST) * BINS_PER_DECADE)
        bins = np.bincount(np.clip(scale, -1, BINS).astype(np.int64) + 1, minlength=BINS + 2).tolist()
        return Histogram(
            self.exact + error.size - positive.size,
            self.below + bins[0],
            tuple(old + new for old, new in zip(self.counts, bins[1:-1], strict=True)),
            self.above + bins[-1],
        )

    @property
    def total(self) -> int:
        return self.exact + self.below + sum(self.counts) + self.above


def ulp_distance(x: Array, r: Array, precision: Precision) -> Array:
    """How many neighbouring values of `precision` lie between finite `x` and `r`, as int64.

    Both are rounded to `precision` first, through float32 as torch does. A value that overflows counts as the one
    after the largest; the two zeros count as one. Method: the bits of a float, read as sign and magnitude, are its
    place among all values of its type."""
    return np.asarray(np.abs(_places(x, precision) - _places(r, precision)))


def _places(values: Array, precision: Precision) -> Array:
    with np.errstate(over="ignore", under="ignore"):
        floats = values.astype(np.float32)
        if precision is Precision.FP16:
            bits, sign = floats.astype(np.float16).view(np.uint16).astype(np.int64), 1 << 15
        elif precision is Precision.BF16:
            bits, sign = _bf16_bits(floats).astype(np.int64), 1 << 15
        else:
            bits, sign = floats.view(np.uint32).astype(np.int64), 1 << 31
    magnitude = bits & (sign - 1)
    return np.where(bits & sign, -magnitude, magnitude)


def _bf16_bits(floats: Array) -> Array:
    """The upper 16 bits of each float32, rounded to nearest, ties to even; no value may be NaN."""
    bits = floats.view(np.uint32)
    return np.asarray((bits + (0x7FFF + (bits >> 16 & 1))) >> 16)
