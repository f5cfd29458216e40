"""Safetensors files by header and byte ranges; no tensor is ever read here.

Format: 8 bytes little-endian header length, the header as JSON, then the tensors' bytes without gaps
(https://github.com/huggingface/safetensors#format).
"""

import json
import math
import os
import stat
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ..schemas.errors import CheckpointError, ConversionError
from ..schemas.tensors import Shape

# Bytes per value; in the ascending order of the library's own enumeration, which decides where its writer puts
# a tensor (see canonical_order).
DTYPE_SIZES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}
MAX_HEADER_BYTES = 100_000_000  # the library's own limit
LFS_POINTER = b"version https://git-lfs"

Progress = Callable[[int], object]  # told the number of bytes written since the last call


@dataclass(frozen=True)
class TensorRange:
    """A tensor's bytes: `nbytes` from `offset` in the file at `path`; dtype in safetensors' spelling (F32, BF16).

    When `transposed`, the tensor is a matrix of `shape` whose transpose lies there, as [shape[1], shape[0]].
    Raises ConversionError when it is transposed and no matrix."""

    path: Path
    dtype: str
    shape: Shape
    offset: int
    nbytes: int
    transposed: bool = False

    def __post_init__(self) -> None:
        if self.transposed and len(self.shape) != 2:
            raise ConversionError(f"{self.path}: only a matrix can lie transposed, not a tensor of {list(self.shape)}")

    def rows(self, start: int, stop: int, shape: Shape) -> "TensorRange":
        """The bytes of rows `start:stop` along the first axis, as a tensor of `shape`.

        Raises ConversionError for a transposed range: its rows are not ranges."""
        if self.transposed:
            raise ConversionError(
                f"{self.path}: the matrix at byte {self.offset} lies transposed; it has no row ranges"
            )
        row = self.nbytes // self.shape[0]
        return TensorRange(self.path, self.dtype, shape, self.offset + start * row, (stop - start) * row)


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself; tensors in file order of their bytes."""

    path: Path
    tensors: dict[str, TensorRange]
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}


def read_header(path: Path) -> Header:
    """The header of a safetensors file, checked against the file's size; no tensor is read.

    Raises CheckpointError for anything else than a whole, well-formed file, naming what it is instead."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise CheckpointError(f"{path}: cannot be read: not a file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(8)
            length = _header_length(path, head, size, file)
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        entries = json.loads(text, object_pairs_hook=_no_duplicates)
        if not isinstance(entries, dict):
            raise ValueError("the header is not an object")
        metadata = _metadata(entries.pop("__metadata__", {}))
        tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in entries.items()}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: damaged safetensors header: {error}; download or save the file again"
        ) from error
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    _check_coverage(path, tensors, 8 + length, size)
    return Header(path, tensors, metadata)


def _header_length(path: Path, head: bytes, size: int, file: BinaryIO) -> int:
    length = int(struct.unpack("<Q", head)[0]) if len(head) == 8 else 0
    if not 2 <= length <= MAX_HEADER_BYTES or 8 + length > size:
        raise CheckpointError(f"{path}: {_what_instead(head + file.read(len(LFS_POINTER)), length, size)}")
    return length


def _what_instead(start: bytes, length: int, size: int) -> str:
    if start.startswith(LFS_POINTER):
        return "a Git LFS pointer, not the weights; fetch them with `git lfs pull`"
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return "a pickle (.ckpt, .pt, .bin), which may run code when opened; expected a .safetensors file"
    if 2 <= length <= MAX_HEADER_BYTES:
        return f"truncated: the header alone ends at byte {8 + length}, the file at {size}; download it again"
    return (
        f"not a safetensors file: the first 8 bytes announce a header of {length} bytes "
        f"(expected 2 to {MAX_HEADER_BYTES})"
    )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return result


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError("__metadata__ must map strings to strings")
    return value


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorRange:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_SIZES:
        raise ValueError(f"{name}: unknown dtype {dtype!r} (known: {', '.join(DTYPE_SIZES)})")
    if not _naturals(shape):
        raise ValueError(f"{name}: shape {shape!r} is not a list of sizes")
    if not _naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"{name}: data_offsets {offsets!r} are not two positions")
    start, stop = offsets
    nbytes = math.prod(shape) * DTYPE_SIZES[dtype]
    if stop - start != nbytes:
        raise ValueError(f"{name}: {dtype} {shape} takes {nbytes} bytes, data_offsets give it {stop - start}")
    return TensorRange(path, dtype, tuple(shape), data_start + start, nbytes)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_coverage(path: Path, tensors: Mapping[str, TensorRange], start: int, size: int) -> None:
    position = start
    for name, tensor in tensors.items():
        if tensor.offset != position:
            raise CheckpointError(
                f"{path}: damaged safetensors header: {name} starts at byte {tensor.offset}, "
                f"the tensor before it ends at {position}; download or save the file again"
            )
        position += tensor.nbytes
    if position > size:
        raise CheckpointError(
            f"{path}: truncated: the header describes {position} bytes, the file has {size} "
            f"({position - size} missing); download it again"
        )
    if position < size:
        raise CheckpointError(f"{path}: {size - position} bytes follow the last tensor; the file is damaged")


class Described(Protocol):
    """A tensor that a header describes."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> Shape: ...
    @property
    def nbytes(self) -> int: ...


def encode_header(tensors: Mapping[str, Described], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file holding `tensors` one after another, padded to 8."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, plan in tensors.items():
        entries[name] = {
            "dtype": plan.dtype,
            "shape": list(plan.shape),
            "data_offsets": [position, position + plan.nbytes],
        }
        position += plan.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
