"""Reads the factors of quantised tensors, and casts values with them.

A tensor has one factor, one for each row or block, or blocks of them in the tiles of cuBLAS."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..schemas.block_types import SCALED_TYPES
from ..schemas.comfy_formats import TILE
from ..schemas.errors import ConversionError
from .cast import Cast, cast_block, cast_counted
from .file_ranges import read_exactly
from .safetensors_reader import Scale, TensorRange

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Factors:
    """The factors of a tensor's values in float32: one for every `group` values, or a single one (group 0); and the
    other numbers that its `scale` names."""

    values: Floats
    scale: Scale
    table: Floats | None = None
    minus: Floats | None = None
    plus: Floats | None = None

    def of(self, span: range) -> np.float32 | Floats:
        """Return the single factor, or the factor of each value whose number is in `span`."""
        return self._each(self.values, span)

    def _each(self, numbers: Floats, span: range) -> np.float32 | Floats:
        group = self.scale.group
        if not group or len(numbers) == 1:
            return np.float32(numbers[0])
        start, stop = self.scale.first + span.start, self.scale.first + span.stop
        groups = numbers[start // group : -(-stop // group)]
        return np.repeat(groups, group)[start % group :][: len(span)]

    def worth(self, values: Floats, span: range) -> Floats:
        """Return what the stored `values`, whose numbers are in `span`, are worth."""
        with np.errstate(all="ignore"):
            if self.table is not None:
                values = self.table[values.astype(np.intp)]
            if self.minus is not None:
                values = values - self._each(self.minus, span)
            if self.plus is not None:
                wide = values.astype(np.float64) * self.of(span) + self._each(self.plus, span)
                values = np.asarray(wide, np.float32)  # rounded once, as CPUs and GPUs do it in one operation
            else:
                values = values * self.of(span) * np.float32(self.scale.last)
            if self.scale.added:
                values = values + np.float32(self.scale.added)
        if self.scale.rounded:
            rounded, _ = cast_block(values.data, "F32", self.scale.rounded)
            values, _ = cast_block(rounded.data, self.scale.rounded, "F32")
        return np.asarray(values, np.float32)


def cast_scaled(data: bytes | memoryview, source: str, target: str, factors: Factors | None, span: range) -> Cast:
    """Cast the bytes of the values whose numbers are in `span`, times their factors, as `cast_counted` does."""
    spare = source in SCALED_TYPES and len(span) % SCALED_TYPES[source].values  # the last byte has half a code too many
    if factors is None or (factors.scale.is_product and not spare):
        return cast_counted(data, source, target, None if factors is None else factors.of(span))
    values = cast_counted(data, source, "F32").values[: len(span)]
    return cast_counted(factors.worth(values, span).data, "F32", target)


def read_scale(source: TensorRange) -> Factors | None:
    """Read the factors of a tensor, if it has any. Raises ConversionError when one is not finite."""
    scale = source.scale
    if scale is None:
        return None
    values = _numbers(scale.factors)
    if scale.tiles:
        values = _untiled(values, *scale.tiles)
    if scale.overall is not None:
        values = _numbers(scale.overall)[0] * values
    if not np.isfinite(values).all():
        odd = values[~np.isfinite(values)][0]
        raise ConversionError(
            f"{scale.factors.path}: the scale at byte {scale.factors.offset} is {odd}, not a finite number; "
            "get the checkpoint in another dtype"
        )
    others = (None if each is None else _numbers(each) for each in (scale.table, scale.minus, scale.plus))
    return Factors(values, scale, *others)


def _numbers(tensor: TensorRange) -> Floats:
    """The numbers of a tensor as float32. A byte, or F8_E8M0, is the exponent of a power of two."""
    with tensor.path.open("rb", buffering=0) as file:
        data = read_exactly(file, tensor.offset, tensor.nbytes)
    if tensor.dtype in ("U8", "F8_E8M0"):
        return (np.frombuffer(data, np.uint8).astype("<u4") << 23).view(np.float32)
    span = range(math.prod(tensor.shape))
    return np.asarray(cast_scaled(data, tensor.dtype, "F32", read_scale(tensor), span).values, np.float32)


def _untiled(values: Floats, rows: int, columns: int) -> Floats:
    """Return the factors row by row. A tile has 32 lines: the factors of rows 0, 32, 64, 96, then of 1, 33, ..."""
    down, across = -(-rows // TILE[0]), -(-columns // TILE[1])
    tiles = values.reshape(down, across, 32, 4, 4).transpose(0, 3, 2, 1, 4)
    return np.ascontiguousarray(tiles.reshape(down * TILE[0], across * TILE[1])[:rows, :columns]).reshape(-1)
