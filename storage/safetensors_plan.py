"""Describes a weights file before it is written: dtypes, shapes, and the sources of the values."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..schemas.block_types import nbytes_of
from ..schemas.dtypes import DTYPE_SIZES
from ..schemas.tensors import Shape
from .safetensors_reader import TensorRange

if TYPE_CHECKING:  # numpy takes longer to import than a header takes to read
    from numpy.typing import NDArray


@dataclass(frozen=True)
class CalculatedRange:
    """Values that are calculated while the file is written, instead of being read from another file.

    `blocks` is called once, when these values are due. It yields contiguous arrays of `nbytes` bytes in all, in the
    dtype of the file, little endian. `sources` are the ranges that it reads, where a plan must name them."""

    nbytes: int
    blocks: Callable[[], "Iterable[NDArray[Any]]"]
    sources: tuple[TensorRange, ...] = ()


Range = TensorRange | CalculatedRange


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to write: dtype (in safetensors' spelling, or a type of GGUF's blocks), shape, and ranges of values.

    The ranges are in the order of their values. A range of another dtype is cast if `schemas.casts` allows the pair. A
    transposed range is transposed back. A plan without ranges is a tensor of zeros."""

    dtype: str
    shape: Shape
    ranges: tuple[Range, ...]

    @property
    def source_ranges(self) -> tuple[TensorRange, ...]:
        """The ranges that lie in other files, and are copied or cast."""
        return tuple(each for each in self.ranges if isinstance(each, TensorRange))

    @property
    def calculated(self) -> tuple[CalculatedRange, ...]:
        """The ranges that are calculated."""
        return tuple(each for each in self.ranges if isinstance(each, CalculatedRange))

    @property
    def files(self) -> frozenset[Path]:
        """The files whose values make the tensor."""
        calculated = (each.sources for each in self.calculated)
        return frozenset(part.path for parts in (self.source_ranges, *calculated) for part in parts)

    @property
    def nbytes(self) -> int:
        """Size of the tensor in the file to be written."""
        if not self.ranges:
            return nbytes_of(self.dtype, math.prod(self.shape))
        return sum(_nbytes_as(each, self.dtype) for each in self.ranges)


def _nbytes_as(values: Range, dtype: str) -> int:
    """Size of a range's values in `dtype`."""
    if isinstance(values, CalculatedRange) or values.dtype == dtype:
        return values.nbytes
    return nbytes_of(dtype, math.prod(values.shape))


def canonical_order(plans: Mapping[str, TensorPlan]) -> dict[str, TensorPlan]:
    """Return the plans in the order in which the safetensors library writes them: wide dtypes first, then by name."""
    rank = {dtype: -index for index, dtype in enumerate(DTYPE_SIZES)}
    # str compares by code point, which is the byte order of UTF-8 that the library sorts by.
    return dict(sorted(plans.items(), key=lambda item: (rank[item[1].dtype], item[0])))


@dataclass(frozen=True)
class PlacedRange:
    """A range of another file, and the byte of the output at which its values, in `dtype`, begin."""

    name: str
    range: TensorRange
    dtype: str
    at: int

    @property
    def computed(self) -> bool:
        """True when the values must be cast, scaled or transposed, not only copied."""
        return self.range.transposed or self.range.scale is not None or self.range.dtype != self.dtype


@dataclass(frozen=True)
class PlacedCalculatedRange:
    """A range to calculate, and the byte of the output at which its values begin."""

    name: str
    range: CalculatedRange
    at: int


def placed(
    tensors: Mapping[str, TensorPlan], places: Mapping[str, int]
) -> Iterator[PlacedRange | PlacedCalculatedRange]:
    """Every range of the tensors with its place in the output; `places` has the byte at which each tensor begins."""
    for name, plan in tensors.items():
        at = places[name]
        for each in plan.ranges:
            if isinstance(each, TensorRange):
                yield PlacedRange(name, each, plan.dtype, at)
            else:
                yield PlacedCalculatedRange(name, each, at)
            at += _nbytes_as(each, plan.dtype)  # a plan without ranges is zeros, which the empty file has already


@dataclass(frozen=True)
class Counts:
    """Counts by tensor: finite values that became infinite, and values that were NaN or infinite before the cast."""

    overflows: Counter[str] = field(default_factory=Counter)
    not_finite: Counter[str] = field(default_factory=Counter)

    def notes(self, file: str) -> tuple[str, ...]:
        """One line for the user on values of `file` that became infinite, and one on values that were not finite."""
        kinds = {
            "became infinite in the new dtype": self.overflows,
            "were NaN or infinite before the cast, and still are": self.not_finite,
        }
        return tuple(
            f"{file}: {found.total()} values in {len(found)} tensors {what}, most in "
            + ", ".join(f"{name} ({count})" for name, count in found.most_common(5))
            for what, found in kinds.items()
            if found
        )
