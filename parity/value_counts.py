"""Counts over the values of arrays: special values, a histogram of errors, distances in ULP."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from ..schemas.precision import Precision
from ..schemas.report import HistogramEntry, ValueCountEntry

Array = NDArray[Any]

BINS_PER_DECADE = 4
LOWEST, HIGHEST = -12, 4  # decades of the histogram
BINS = (HIGHEST - LOWEST) * BINS_PER_DECADE
# log10 of the bins' edges, lower ones included.
HISTOGRAM_EDGES = tuple(LOWEST + index / BINS_PER_DECADE for index in range(BINS + 1))
# The numpy type of each precision, a signed integer of its size, and one that holds differences of these.
TYPES: Mapping[Precision, tuple[Any, Any, Any]] = {
    Precision.FP32: (np.float32, np.int32, np.int64),
    Precision.FP16: (np.float16, np.int16, np.int32),
    Precision.BF16: (bfloat16, np.int16, np.int32),
}


def count_values(hits: Array, shape: tuple[int, ...]) -> ValueCountEntry:
    """How many of the flat booleans `hits` are true, and the index of the first in an array of `shape`."""
    count = int(np.count_nonzero(hits))
    return ValueCountEntry(count=count, first=index_in(shape, int(hits.argmax())) if count else None)


def index_in(shape: tuple[int, ...], flat: int) -> tuple[int, ...]:
    """The index in an array of `shape` of the value at the flat index `flat`."""
    return tuple(map(int, np.unravel_index(flat, shape)))


def histogram_of(error: Array, unit: float) -> HistogramEntry:
    """The errors divided by `unit`, counted by size in quarter decades; no error may be negative."""
    decades = np.log10(error[error > 0]) - math.log10(unit)
    counts, _ = np.histogram(decades, BINS, (LOWEST, HIGHEST))
    return HistogramEntry(
        edges=HISTOGRAM_EDGES,
        exact=error.size - decades.size,
        below=int(np.count_nonzero(decades < LOWEST)),
        counts=tuple(counts.tolist()),
        above=int(np.count_nonzero(decades > HIGHEST)),
    )


def ulp_distance(x: Array, r: Array, precision: Precision) -> Array:
    """How many neighbouring values of `precision` lie between finite `x` and `r`, as integers.

    Both are rounded to `precision` first, through float32 as torch does. A value that overflows counts as the one
    after the largest; the two zeros count as one. Method: the bits of a float, read as sign and magnitude, are its
    place among all values of its type."""
    return np.asarray(np.abs(_places(x, precision) - _places(r, precision)))


def _places(values: Array, precision: Precision) -> Array:
    kind, signed, wider = TYPES[precision]
    with np.errstate(over="ignore", under="ignore"):
        bits = values.astype(np.float32).astype(kind).view(signed).astype(wider)
    return np.asarray(np.where(bits < 0, np.iinfo(signed).min - bits, bits))
