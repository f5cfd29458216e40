"""Compares byte ranges of two files value by value, through memory maps and in slices."""

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...schemas.block_types import BLOCK_TYPES, nbytes_of
from ...schemas.casts import castable
from ...schemas.dtypes import DTYPE_SIZES, FLOATS, FP8, INTEGERS
from ...schemas.errors import CheckpointError
from ...schemas.messages import reason
from ...storage.cast import cast_block
from ...storage.read_scale import Factors, cast_scaled, read_scale
from ...storage.safetensors_reader import TensorRange

BLOCK = 1 << 22  # values that one task of a thread compares
SLICE = 1 << 18  # bytes at a time: larger scratch space is paged in anew each time

Array = NDArray[Any]

_LARGEST = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F80_0000, "F64": 0x7FF0_0000_0000_0000}  # patterns of infinity


@dataclass(frozen=True)
class Pair:
    """A tensor in two files, of one shape."""

    found: TensorRange
    expected: TensorRange


@dataclass(frozen=True)
class Difference:
    """How many values differ, by how much at most (None if not numbers), and the flat index of the first."""

    count: int = 0
    max_abs: float | None = None
    first: int = 0

    def joined(self, other: "Difference") -> "Difference":
        """The difference of this part of a tensor and a later part together."""
        if not self.count or not other.count:
            return self if self.count else other
        both = (self.max_abs, other.max_abs)
        worst = None if None in both else max(value for value in both if value is not None)
        return Difference(self.count + other.count, worst, self.first)


class MappedFiles:
    """Maps each file into memory once; the maps close when this object and all arrays of its bytes are gone."""

    def __init__(self) -> None:
        self._maps: dict[Path, Array] = {}
        self._lock = Lock()

    def bytes_of(self, path: Path) -> Array:
        with self._lock:
            if path not in self._maps:
                try:
                    with path.open("rb") as file:
                        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                except (OSError, ValueError) as error:
                    raise CheckpointError(f"{path}: cannot be read: {reason(error)}; check the file") from error
                mapped.madvise(mmap.MADV_SEQUENTIAL)
                self._maps[path] = np.frombuffer(mapped, np.uint8)  # the array keeps the map open as long as it lives
            return self._maps[path]


def blocks_of(pair: Pair) -> Iterator[range]:
    """The flat indices of a tensor, cut into tasks."""
    count = math.prod(pair.found.shape)
    return (range(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))


def differences(files: MappedFiles, pair: Pair, span: range) -> Difference:
    """The difference of the values at the flat indices `span`.

    If dtypes differ, the wider is cast to the narrower. Two dtypes of one width are cast in the direction in which
    fewer values differ. After a cast, NaN equals NaN."""
    x, y = pair.found, pair.expected
    scales = read_scale(x), read_scale(y)
    step = SLICE // max(DTYPE_SIZES[read_as(x)], DTYPE_SIZES[read_as(y)])
    unequal = np.empty(SLICE, np.bool_)
    total = Difference()
    for start in range(span.start, span.stop, step):
        part = range(start, min(start + step, span.stop))
        a, b = _values(files, x, part, scales[0]), _values(files, y, part, scales[1])
        if read_as(x) == read_as(y):
            if np.not_equal(a, b, out=unequal[: a.size]).any():
                total = total.joined(_differing(a, b, read_as(x), start))
        else:
            total = total.joined(_after_cast(a, read_as(x), b, read_as(y), start))
    return total


def read_as(tensor: TensorRange) -> str:
    """The dtype a tensor's values are compared in: its own, but float32 for scaled fp8 and for GGUF's blocks."""
    return tensor.dtype if tensor.scale is None and tensor.dtype not in BLOCK_TYPES else "F32"


def comparable(x: TensorRange, y: TensorRange) -> bool:
    """True when the dtypes of two tensors are supported, and equal or one can be cast to the other."""
    a, b = read_as(x), read_as(y)
    return a in DTYPE_SIZES and b in DTYPE_SIZES and (a == b or castable(a, b) or castable(b, a))


def _values(files: MappedFiles, tensor: TensorRange, part: range, factors: Factors | None) -> Array:
    """The values at the flat indices `part` in the dtype of `read_as`, as bytes."""
    stored = _bytes(files, tensor, part)
    if read_as(tensor) == tensor.dtype:
        return stored
    return cast_scaled(stored.tobytes(), tensor.dtype, "F32", factors, part).values.view(np.uint8)


def _bytes(files: MappedFiles, tensor: TensorRange, part: range) -> Array:
    """The stored values at the flat indices `part`, as bytes. They are whole blocks, as all steps are powers of two."""
    content = files.bytes_of(tensor.path)
    if tensor.offset + tensor.nbytes > content.size:
        raise CheckpointError(f"{tensor.path}: ends early; it was cut short while it was read, write it again")
    if not tensor.transposed:
        start, stop = nbytes_of(tensor.dtype, part.start), nbytes_of(tensor.dtype, part.stop)
        return content[tensor.offset + start : tensor.offset + stop]
    (rows, columns), size = tensor.shape, DTYPE_SIZES[tensor.dtype]
    matrix = content[tensor.offset : tensor.offset + tensor.nbytes].reshape(columns, rows, size).transpose(1, 0, 2)
    first, last = part.start // columns, (part.stop - 1) // columns + 1
    flat = matrix[first:last].reshape(-1)
    return flat[(part.start - first * columns) * size : (part.stop - first * columns) * size]


def _differing(a: Array, b: Array, dtype: str, start: int) -> Difference:
    """The difference of values of one dtype, given as bytes."""
    size = DTYPE_SIZES[dtype]
    places = np.flatnonzero((a.reshape(-1, size) != b.reshape(-1, size)).any(axis=1))
    return _described(a, b, dtype, places, start)


def _after_cast(a: Array, source: str, b: Array, target: str, start: int) -> Difference:
    casts = []  # nothing is cast to fp8
    if target not in FP8 and (DTYPE_SIZES[source] >= DTYPE_SIZES[target] or source in FP8):
        casts.append((target, cast_block(a.tobytes(), source, target)[0].view(np.uint8), b))
    if source not in FP8 and (DTYPE_SIZES[source] <= DTYPE_SIZES[target] or target in FP8):
        casts.append((source, a, cast_block(b.tobytes(), target, source)[0].view(np.uint8)))
    found = []
    for dtype, x, y in casts:
        bits = [np.frombuffer(values.tobytes(), f"<u{DTYPE_SIZES[dtype]}") for values in (x, y)]
        nan = [(pattern & (1 << 8 * pattern.itemsize - 1) - 1) > _LARGEST[dtype] for pattern in bits]
        places = np.flatnonzero((bits[0] != bits[1]) & ~(nan[0] & nan[1]))
        found.append(_described(x, y, dtype, places, start))
    return min(found, key=lambda difference: difference.count)


def _described(a: Array, b: Array, dtype: str, places: Array, start: int) -> Difference:
    if not places.size:
        return Difference()
    x, y = (_numbers(values, dtype, places) for values in (a, b))
    worst = None
    if x is not None and y is not None:
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.abs(x - y)
        same = x == y  # the two zeros, two infinities
        worst = float(np.where(same, 0, np.where(np.isnan(error), np.inf, error)).max())
    return Difference(int(places.size), worst, start + int(places[0]))


def _numbers(values: Array, dtype: str, places: Array) -> Array | None:
    """The values at `places` in float64; None for dtypes that numpy lacks."""
    size = DTYPE_SIZES[dtype]
    chosen = values.reshape(-1, size)[places].tobytes()
    if dtype in (*FLOATS, *FP8):
        return np.asarray(cast_block(chosen, dtype, "F64")[0])
    if dtype in INTEGERS:
        return np.frombuffer(chosen, INTEGERS[dtype]).astype(np.float64)
    return None
