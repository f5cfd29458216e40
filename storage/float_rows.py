"""Reads the rows of a matrix as float32, whatever its dtype: floats, fp8, blocks of GGUF, and codes with factors."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..schemas.block_types import nbytes_of
from .file_ranges import read_exactly
from .read_scale import cast_scaled, read_scale
from .safetensors_reader import TensorRange

Floats = NDArray[np.float32]


def float_rows(matrix: TensorRange, height: int, *, step: int = 0) -> Iterator[Floats]:
    """Yield up to `height` rows at a time, (n, columns), from the first row to the last.

    With a `step`, each yield begins that many rows after the one before, so that some rows are passed over. Raises
    OSError if the file ends too early, ConversionError for a factor that is not finite."""
    rows = matrix.shape[0]
    columns = int(np.prod(matrix.shape[1:]))
    scale = read_scale(matrix)
    with matrix.path.open("rb", buffering=0) as file:
        for start in range(0, rows, step or height):
            span = range(start * columns, min(start + height, rows) * columns)
            nbytes = nbytes_of(matrix.dtype, len(span))
            data = read_exactly(file, matrix.offset + nbytes_of(matrix.dtype, span.start), nbytes)
            values = cast_scaled(data, matrix.dtype, "F32", scale, span).values
            yield values.reshape(-1, columns)
