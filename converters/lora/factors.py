"""The factors of LoRAs: small matrices that are read when needed, and copied byte for byte if they do not change."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from ...schemas.dtypes import DTYPE_SIZES, FLOATS, INTEGERS
from ...schemas.errors import CheckpointError, LayoutError
from ...schemas.tensors import Shape
from ...storage.safetensors_plan import CalculatedRange, TensorPlan
from ...storage.safetensors_reader import TensorRange
from .encoding import Array, compute_type, decode, encode

MOST_VALUES = 8  # values of a setting that is stored as a tensor; a shape is the longest


@dataclass(frozen=True)
class Factor:
    """A matrix, with its dtype in safetensors' spelling.

    `load` returns its numbers: float64 for F64, float32 for all other dtypes. `source` is the range of a file that
    holds the same bytes; None for a calculated matrix."""

    dtype: str
    shape: Shape
    load: Callable[[], Array]
    source: TensorRange | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_SIZES[self.dtype]


def stored(name: str, tensor: TensorRange) -> Factor:
    """Return the tensor `name` of a file. Raises LayoutError for a dtype that is no 16, 32 or 64 bit float."""
    if tensor.dtype not in FLOATS:
        raise LayoutError(
            f"{tensor.path}: {name}: expected a dtype of {', '.join(FLOATS)}, found {tensor.dtype}; "
            "save it as F16 or F32"
        )
    return Factor(tensor.dtype, tensor.shape, lambda: read_numbers(tensor), tensor)


def factor_plan(factor: Factor) -> TensorPlan:
    """Return a factor as a tensor to write: the range of its source, or its encoded numbers."""
    if factor.source is not None:
        return TensorPlan(factor.dtype, factor.shape, (factor.source,))
    values = CalculatedRange(factor.nbytes, lambda: [encode(factor.load(), factor.dtype)[0]])
    return TensorPlan(factor.dtype, factor.shape, (values,))


def read_numbers(tensor: TensorRange) -> Array:
    """Return the numbers of a tensor, in its shape."""
    return decode(read_bytes(tensor), tensor.dtype).reshape(tensor.shape)


def read_values(name: str, tensor: TensorRange) -> list[float]:
    """Return the values of a small tensor that is a setting, such as alpha, of any numeric dtype and shape.

    Raises LayoutError for another dtype, for a long list, and for values that are not finite."""
    if tensor.dtype not in (*FLOATS, *INTEGERS):
        known = ", ".join((*FLOATS, *INTEGERS))
        raise LayoutError(f"{tensor.path}: {name}: expected a dtype of {known}, found {tensor.dtype}; save it as F32")
    if math.prod(tensor.shape) > MOST_VALUES:
        raise LayoutError(f"{tensor.path}: {name}: expected a few numbers, found shape {list(tensor.shape)}")
    data = read_bytes(tensor)
    numbers = decode(data, tensor.dtype) if tensor.dtype in FLOATS else np.frombuffer(data, INTEGERS[tensor.dtype])
    values = [float(number) for number in numbers]
    if not all(map(math.isfinite, values)):
        raise LayoutError(f"{tensor.path}: {name}: expected a finite number, found {values}")
    return values


def read_bytes(tensor: TensorRange) -> bytes:
    """Return the bytes of a tensor. Raises CheckpointError when the file ends earlier than its header says."""
    try:
        with tensor.path.open("rb") as file:
            file.seek(tensor.offset)
            data = file.read(tensor.nbytes)
    except OSError as error:
        raise CheckpointError(f"{tensor.path}: cannot be read: {error.strerror}") from error
    if len(data) < tensor.nbytes:
        missing = tensor.nbytes - len(data)
        raise CheckpointError(f"{tensor.path}: ended {missing} bytes too early; was it changed meanwhile?")
    return data


def reshaped(factor: Factor, shape: Shape) -> Factor:
    """Return the same numbers in another shape."""
    if shape == factor.shape:
        return factor
    source = replace(factor.source, shape=shape) if factor.source else None
    return Factor(factor.dtype, shape, lambda: factor.load().reshape(shape), source)


def rows(factor: Factor, start: int, stop: int) -> Factor:
    """Return rows `start:stop` along the first axis."""
    shape = (stop - start, *factor.shape[1:])
    source = factor.source.rows(start, stop, shape) if factor.source else None
    return Factor(factor.dtype, shape, lambda: factor.load()[start:stop], source)


def stacked(factors: Sequence[Factor]) -> Factor:
    """Return the factors one below the other, without rounding."""
    if len(factors) == 1:
        return factors[0]
    shape = (sum(factor.shape[0] for factor in factors), *factors[0].shape[1:])
    return Factor(common_dtype(factors), shape, lambda: np.concatenate([factor.load() for factor in factors]))


def block_diagonal(factors: Sequence[Factor]) -> Factor:
    """Return a matrix with the factors along its diagonal and zeros elsewhere."""
    *starts, width = accumulate((factor.shape[1] for factor in factors), initial=0)
    wide = (padded(f, (f.shape[0], width), left=start) for f, start in zip(factors, starts, strict=True))
    return stacked([*wide])


def scaled(factor: Factor, scale: float) -> Factor:
    """Return the factor times a number, in float32 at least: 16 bits seldom hold a product."""
    if scale == 1:
        return factor
    dtype = "F64" if factor.dtype == "F64" else "F32"
    return Factor(dtype, factor.shape, lambda: (factor.load().astype(np.float64) * scale).astype(compute_type(dtype)))


def padded(factor: Factor, shape: Shape, *, left: int = 0) -> Factor:
    """Return a matrix with zeros below it, beside it and, for `left` columns, before it."""
    if shape == factor.shape:
        return factor
    rows, columns = factor.shape
    widths = [(0, shape[0] - rows), (left, shape[1] - columns - left)]
    return Factor(factor.dtype, shape, lambda: np.pad(factor.load(), widths))


def zeros(shape: Shape) -> Factor:
    return Factor("F32", shape, lambda: np.zeros(shape, np.float32))


def scalar(value: float) -> Factor:
    """Return a single number as F32, the dtype in which alpha is stored."""
    return Factor("F32", (), lambda: np.asarray(value, np.float32))


def common_dtype(factors: Sequence[Factor]) -> str:
    """Return the dtype that holds the numbers of all factors exactly."""
    dtypes = {factor.dtype for factor in factors}
    if len(dtypes) == 1:
        return dtypes.pop()
    return "F64" if "F64" in dtypes else "F32"
