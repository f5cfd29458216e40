"""The tensors that make one quantised weight, and the errors for those that are missing or do not fit."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from ...schemas.dtypes import DTYPES, FLOATS
from ...schemas.errors import LayoutError
from ...schemas.tensors import Shape
from ...storage.safetensors_reader import Header, TensorRange

AS_FLOATS = "get the checkpoint in bf16, fp16 or fp32"
# torch's name of a float -> the dtype that values are rounded to; "" for float32, in which they are calculated.
ROUNDED: Mapping[str, str] = {DTYPES[dtype].torch: "" if dtype == "F32" else dtype for dtype in FLOATS}


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
        """Return a tensor and note that it is used. Raises LayoutError as `find` does."""
        self.used.append(self.names[part])
        return self.find(part, dtypes, count)

    def find(self, part: str, dtypes: Collection[str], count: int | None = None) -> TensorRange:
        """Return a tensor. Raises LayoutError unless it is there, of one of `dtypes`, with `count` values."""
        name = self.names[part]
        tensor = self.header.tensors.get(name)
        if tensor is None:
            raise self.error(f"{name} is missing")
        if tensor.dtype not in dtypes:
            raise self.error(f"{name} is {tensor.dtype}, expected {' or '.join(dtypes)}")
        if count is not None and math.prod(tensor.shape) != count:
            raise self.error(f"{name} has shape {list(tensor.shape)}, expected {count} numbers")
        return tensor

    def require_bytes(self, tensor: TensorRange, nbytes: int, shape: Shape) -> None:
        """Raise LayoutError unless the codes of a weight of `shape` fill the tensor."""
        if tensor.nbytes != nbytes:
            raise self.error(f"the codes have {tensor.nbytes} bytes, expected {nbytes} for shape {list(shape)}")

    def error(self, problem: str, advice: str = AS_FLOATS) -> LayoutError:
        return LayoutError(f"{self.header.path}: {self.name}, quantised by {self.program}: {problem}; {advice}")


def with_weights(header: Header, found: Iterable[tuple[LayerParts, TensorRange]]) -> Header:
    """Return the header with each weight that was found, and without all tensors that make these weights."""
    weights: dict[str, TensorRange] = {}
    used: set[str] = set()
    for parts, weight in found:
        weights[parts.name] = weight
        used.update(parts.used)
    kept = {name: tensor for name, tensor in header.tensors.items() if name in weights or name not in used}
    return replace(header, tensors=kept | weights)


def content(tensor: TensorRange) -> bytes:
    """Return the bytes of a small tensor."""
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        return file.read(tensor.nbytes)


def is_shape(value: object) -> bool:
    """True for a list of sizes above 0."""
    return isinstance(value, list) and bool(value) and all(type(size) is int and size > 0 for size in value)
