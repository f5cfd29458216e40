"""Describes a safetensors file before it is written: dtypes, shapes, and the sources of the values."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from ..schemas.dtypes import DTYPE_SIZES
from ..schemas.tensors import Shape
from .safetensors_reader import TensorRange


@dataclass(frozen=True)
class Calculated:
    """Values that are calculated while the file is written.

    `blocks` is called once, when these values are due. It yields contiguous arrays of `nbytes` bytes in all, in the
    dtype of the file, little endian."""

    nbytes: int
    blocks: Callable[[], Iterable[NDArray[Any]]]


Part = TensorRange | Calculated


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to write: dtype (in safetensors' spelling), shape, and its parts in order.

    A range of another dtype is cast if `cast.castable` allows the pair. A transposed range is transposed back. A plan
    without parts is a tensor of zeros."""

    dtype: str
    shape: Shape
    parts: tuple[Part, ...]

    @property
    def ranges(self) -> tuple[TensorRange, ...]:
        """The parts that are copied from other files."""
        return tuple(part for part in self.parts if isinstance(part, TensorRange))

    @property
    def nbytes(self) -> int:
        """The size of the tensor in the new file."""
        if not self.parts:
            return math.prod(self.shape) * DTYPE_SIZES[self.dtype]
        return sum(_nbytes_as(part, self.dtype) for part in self.parts)


def _nbytes_as(part: Part, dtype: str) -> int:
    """Return the size of a part's values in `dtype`."""
    if isinstance(part, Calculated) or part.dtype == dtype:
        return part.nbytes
    return part.nbytes // DTYPE_SIZES[part.dtype] * DTYPE_SIZES[dtype]


def canonical_order(plans: Mapping[str, TensorPlan]) -> dict[str, TensorPlan]:
    """Return the plans in the order in which the safetensors library writes them: wide dtypes first, then by name."""
    rank = {dtype: -index for index, dtype in enumerate(DTYPE_SIZES)}
    # str compares by code point, which is the byte order of UTF-8 that the library sorts by.
    return dict(sorted(plans.items(), key=lambda item: (rank[item[1].dtype], item[0])))


@dataclass(frozen=True)
class PlacedRange:
    """A range of another file, and the byte of the output at which its values, in `dtype`, begin."""

    name: str
    part: TensorRange
    dtype: str
    at: int

    @property
    def computed(self) -> bool:
        """True when the values must be cast, scaled or transposed, not only copied."""
        part = self.part
        return part.transposed or part.scale is not None or part.dtype != self.dtype


@dataclass(frozen=True)
class PlacedValues:
    """Values to calculate, and the byte of the output at which they begin."""

    name: str
    part: Calculated
    at: int


def placed(tensors: Mapping[str, TensorPlan], at: int) -> Iterator[PlacedRange | PlacedValues]:
    """Yield every part of the tensors with its place in the output; the first tensor begins at byte `at`."""
    for name, plan in tensors.items():
        for part in plan.parts:
            if isinstance(part, TensorRange):
                yield PlacedRange(name, part, plan.dtype, at)
            else:
                yield PlacedValues(name, part, at)
            at += _nbytes_as(part, plan.dtype)
        at += 0 if plan.parts else plan.nbytes  # zeros, which the empty file has already
