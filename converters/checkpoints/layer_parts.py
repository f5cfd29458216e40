"""The tensors that make one quantised weight, and the errors for those that are missing or do not fit."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from ...schemas.errors import LayoutError
from ...schemas.tensors import Shape
from ...storage.safetensors_reader import Header, TensorRange

AS_FLOATS = "get the checkpoint in bf16, fp16 or fp32"


@dataclass
class LayerParts:
    """The tensors of the weight `name`, which `program` quantised: their names in the file by what they are.

    `used` collects the names of the tensors that were taken."""

    header: Header
    program: str
    name: str
    names: Mapping[str, str]
    used: list[str] = field(default_factory=list)

    def has(self, part: str) -> bool:
        return self.names[part] in self.header.tensors

    def take(self, part: str, dtypes: Collection[str], count: int | None = None) -> TensorRange:
        """Return a tensor. Raises LayoutError unless it is there, of one of `dtypes`, with `count` values."""
        name = self.names[part]
        tensor = self.header.tensors.get(name)
        if tensor is None:
            raise self.error(f"{name} is missing")
        if tensor.dtype not in dtypes:
            raise self.error(f"{name} is {tensor.dtype}, expected {' or '.join(dtypes)}")
        if count is not None and math.prod(tensor.shape) != count:
            raise self.error(f"{name} has shape {list(tensor.shape)}, expected {count} numbers")
        self.used.append(name)
        return tensor

    def require_bytes(self, tensor: TensorRange, nbytes: int, shape: Shape) -> None:
        """Raise LayoutError unless the codes of a weight of `shape` fill the tensor."""
        if tensor.nbytes != nbytes:
            raise self.error(f"the codes have {tensor.nbytes} bytes, expected {nbytes} for shape {list(shape)}")

    def error(self, problem: str, advice: str = AS_FLOATS) -> LayoutError:
        return LayoutError(f"{self.header.path}: {self.name}, quantised by {self.program}: {problem}; {advice}")


def is_shape(value: object) -> bool:
    """True for a list of sizes above 0."""
    return isinstance(value, list) and bool(value) and all(type(size) is int and size > 0 for size in value)
