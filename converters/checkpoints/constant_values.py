"""Tensors whose values are known when a file is planned."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...storage.safetensors_plan import CalculatedRange, TensorPlan


@dataclass(frozen=True)
class Constant:
    """Values that are known already; their bytes stand for them in the plan's fingerprint."""

    dtype: str
    data: bytes

    def __call__(self) -> list[NDArray[Any]]:
        return [np.frombuffer(self.data, self.dtype)]


def constant(values: NDArray[Any]) -> CalculatedRange:
    return CalculatedRange(values.nbytes, Constant(values.dtype.str, values.tobytes()))


def constant_text(text: str) -> TensorPlan:
    """Plan a tensor of the bytes of a text."""
    data = np.frombuffer(text.encode(), np.uint8)
    return TensorPlan("U8", data.shape, (constant(data),))
