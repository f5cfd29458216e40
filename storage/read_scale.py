"""Reads the factors of quantised tensors: one number, one for each row or block, or blocks in the tiles of cuBLAS."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..schemas.errors import ConversionError
from ..schemas.scale_tiles import TILE
from .cast import cast_block
from .file_ranges import read_exactly
from .safetensors_reader import TensorRange

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Factors:
    """The factors of a tensor's values in float32: one for every `group` values, or a single one (group 0)."""

    values: Floats
    group: int
    first: int

    def of(self, span: range) -> np.float32 | Floats:
        """Return the single factor, or the factor of each value whose number is in `span`."""
        if not self.group:
            return np.float32(self.values[0])
        start, stop = self.first + span.start, self.first + span.stop
        groups = self.values[start // self.group : -(-stop // self.group)]
        return np.repeat(groups, self.group)[start % self.group :][: len(span)]


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
    return Factors(values, scale.group, scale.first)


def _numbers(tensor: TensorRange) -> Floats:
    """The numbers of a tensor as float32. A byte, or F8_E8M0, is the exponent of a power of two."""
    with tensor.path.open("rb", buffering=0) as file:
        data = read_exactly(file, tensor.offset, tensor.nbytes)
    if tensor.dtype in ("U8", "F8_E8M0"):
        return (np.frombuffer(data, np.uint8).astype("<u4") << 23).view(np.float32)
    return np.asarray(cast_block(data, tensor.dtype, "F32")[0], np.float32)


def _untiled(values: Floats, rows: int, columns: int) -> Floats:
    """Return the factors row by row. A tile has 32 lines: the factors of rows 0, 32, 64, 96, then of 1, 33, ..."""
    down, across = -(-rows // TILE[0]), -(-columns // TILE[1])
    tiles = values.reshape(down, across, 32, 4, 4).transpose(0, 3, 2, 1, 4)
    return np.ascontiguousarray(tiles.reshape(down * TILE[0], across * TILE[1])[:rows, :columns]).reshape(-1)
