"""Tensors whose values are known when a file is planned."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...storage.safetensors_plan import CalculatedRange, TensorPlan

if TYPE_CHECKING:  # numpy is not needed to plan
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Constant:
    """Values that are known already; their bytes stand for them in the plan's fingerprint."""

    dtype: str
    data: bytes

    def __call__(self) -> "list[NDArray[Any]]":
        import numpy as np

        return [np.frombuffer(self.data, self.dtype)]


def constant(values: "NDArray[Any]") -> CalculatedRange:
    return CalculatedRange(values.nbytes, Constant(values.dtype.str, values.tobytes()))


def constant_text(text: str) -> TensorPlan:
    """Plan a tensor of the bytes of a text."""
    data = text.encode()
    return TensorPlan("U8", (len(data),), (CalculatedRange(len(data), Constant("|u1", data)),))
