"""How much of a matrix quantising it loses, measured on rows that are spread over it.

On activations of equal variance, this is the error of the layer's product. A matrix that loses more than TOLERATED
times what normal numbers lose has outliers. The network is not run, so that memory stays bounded."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...schemas.messages import listed
from ...schemas.quantization import TOLERATED
from ...storage.float_rows import float_rows
from ...storage.safetensors_reader import TensorRange

SAMPLE = 16  # parts of a matrix whose error is measured
SAMPLE_ROWS = 32  # of each

Floats = NDArray[np.float32]
AsStored = Callable[[Floats], Floats]  # the values that a reader gets of rows


class SampledError(NamedTuple):
    """The relative L2 error of a matrix, and the largest that is tolerated."""

    error: float
    limit: float

    @property
    def tolerated(self) -> bool:
        return self.error <= self.limit

    def __str__(self) -> str:
        return f"error {self.error:.1%}, tolerated {self.limit:.1%}"


def sampled_error(matrix: TensorRange, as_stored: AsStored, normal_error: float) -> SampledError:
    """The error of SAMPLE parts of SAMPLE_ROWS rows; 0 if all of them are 0.

    `normal_error` is that of normal numbers in the same format."""
    step = max(SAMPLE_ROWS, matrix.shape[0] // SAMPLE)
    lost = whole = 0.0
    for rows in float_rows(matrix, SAMPLE_ROWS, step=step):
        lost += float(np.square(rows - as_stored(rows), dtype=np.float64).sum())
        whole += float(np.square(rows, dtype=np.float64).sum())
    return SampledError(float(np.sqrt(lost / whole)) if whole else 0.0, TOLERATED * normal_error)


def in_float(floats: Mapping[str, str]) -> str:
    """Return the end of a note: the modules that stay float, each with its reason."""
    kept = [f"{module} ({reason})" for module, reason in floats.items()]
    return f"; in float: {listed(kept, 4)}" if kept else ""


def error_of_normal_numbers(columns: int, as_stored: AsStored) -> float:
    """Return the relative L2 error of normal numbers, which have no outliers."""
    rows = np.random.default_rng(0).standard_normal((64, columns), np.float32)
    return float(np.sqrt(np.square(rows - as_stored(rows)).sum() / np.square(rows).sum()))
