"""What to write into a safetensors file: for each tensor, the ranges of other files its values come from."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..schemas.tensors import Shape
from .safetensors_header import DTYPE_SIZES, TensorRange


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to write: its dtype and shape, and the ranges its values are, one after another.

    Ranges of another dtype are cast, where cast.castable; transposed ones are turned round. A plan without ranges is a
    tensor of zeros."""

    dtype: str
    shape: Shape
    ranges: tuple[TensorRange, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file to be written."""
        if not self.ranges:
            return math.prod(self.shape) * DTYPE_SIZES[self.dtype]
        return sum(_nbytes_as(part, self.dtype) for part in self.ranges)


def _nbytes_as(part: TensorRange, dtype: str) -> int:
    return part.nbytes // DTYPE_SIZES[part.dtype] * DTYPE_SIZES[dtype]


def canonical_order(plans: Mapping[str, TensorPlan]) -> dict[str, TensorPlan]:
    """The same plans in the order the safetensors library writes them: wide dtypes first, each dtype by name."""
    rank = {dtype: -index for index, dtype in enumerate(DTYPE_SIZES)}
    # str compares by code point, which is the byte order of UTF-8 that the library sorts by.
    return dict(sorted(plans.items(), key=lambda item: (rank[item[1].dtype], item[0])))


@dataclass(frozen=True)
class Piece:
    """One range of a plan, and the byte of the output its values start at, in `dtype`."""

    name: str
    part: TensorRange
    dtype: str
    at: int

    @property
    def computed(self) -> bool:
        part = self.part
        return part.transposed or part.scale is not None or part.dtype != self.dtype


def pieces(tensors: Mapping[str, TensorPlan], at: int) -> Iterator[Piece]:
    for name, plan in tensors.items():
        for part in plan.ranges:
            yield Piece(name, part, plan.dtype, at)
            at += _nbytes_as(part, plan.dtype)
        at += 0 if plan.ranges else plan.nbytes  # zeros, which the empty file has already
