"""Safetensors files by header and byte ranges; no tensor is ever read here.

Format: 8 bytes little-endian header length, the header as JSON, then the tensors' bytes without gaps
(https://github.com/huggingface/safetensors#format).
"""

import json
import math
import os
import stat
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from ..schemas.errors import CheckpointError, ConversionError
from ..schemas.limits import MAX_HEADER_BYTES, MAX_HEADER_ITEMS
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
# Bits per value of dtypes that the library knows and nothing here computes with.
UNSUPPORTED_BITS: Mapping[str, int] = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "C64": 64,
}
DTYPE_BITS = {**{dtype: 8 * size for dtype, size in DTYPE_SIZES.items()}, **UNSUPPORTED_BITS}
FIELDS = ("dtype", "shape", "data_offsets")
LARGEST = (1 << 64) - 1  # of a size; the library counts values and bits in 64 bits
LFS_POINTER = b"version https://git-lfs"
STARTS: Mapping[bytes, str] = {
    LFS_POINTER: "a Git LFS pointer, not the weights; fetch them with `git lfs pull`",
    b"PK\x03\x04": "a pickled checkpoint (a zip archive of torch.save), not a safetensors file",
    b"\x80": "a pickle, not a safetensors file",
    b"GGUF": "a GGUF file, which is not supported; get the weights as safetensors",
    b"\x89HDF": "an HDF5 file, which is not supported; get the weights as safetensors",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"7z\xbc\xaf": "a 7-Zip archive; unpack it first",
    b"<": "a web page or XML, not weights; download the file itself",
    b"{": "JSON text, not weights; give the weights file it belongs to",
}


@dataclass(frozen=True)
class TensorRange:
    """A tensor's bytes: `nbytes` from `offset` in the file at `path`; dtype in safetensors' spelling (F32, BF16).

    When `transposed`, the tensor is a matrix of `shape` whose transpose lies there, as [shape[1], shape[0]].
    With a `scale`, the tensor is what lies there times the one number that lies at that range.
    Raises ConversionError when it is transposed and no matrix."""

    path: Path
    dtype: str
    shape: Shape
    offset: int
    nbytes: int
    transposed: bool = False
    scale: "TensorRange | None" = None

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
        return replace(self, shape=shape, offset=self.offset + start * row, nbytes=(stop - start) * row)


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
    """The header of a safetensors file, as `header_in` reads it."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise CheckpointError(f"{path}: cannot be read: not a file")
        with path.open("rb") as file:
            return header_in(file, path, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def header_in(file: BinaryIO, path: Path, size: int) -> Header:
    """The header at the beginning of `file`, checked against the file's `size` in bytes; no tensor is read.

    Accepted are the files that the safetensors library accepts, and dtypes that the library does not know yet. A name
    that occurs twice is refused, as the format forbids it. Raises CheckpointError for every other file: the message
    says where the file at `path` is damaged, or what kind of file it is instead."""
    length = _header_length(path, file.read(8), size, file)
    text = file.read(length)
    try:
        entries = _parse(text)
        metadata = _metadata(entries.pop("__metadata__", None))
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
    if not size:
        return "not a safetensors file: it is empty; download it again"
    for first, meaning in STARTS.items():
        if start.startswith(first) and start[8:9] != b"{":  # where a header begins, its length may have any bytes
            return meaning
    if 2 <= length <= MAX_HEADER_BYTES:
        return f"truncated: the header alone ends at byte {8 + length}, the file at {size}; download it again"
    return (
        f"not a safetensors file: the first 8 bytes announce a header of {length} bytes "
        f"(expected 2 to {MAX_HEADER_BYTES})"
    )


def _parse(text: bytes) -> dict[str, Any]:
    """The header's object, in JSON as strict as the library's."""
    items = sum(map(text.count, (b",", b"[", b"{")))
    if items > MAX_HEADER_ITEMS:
        raise ValueError(f"it has {items} items (at most {MAX_HEADER_ITEMS} are read)")
    entries = json.loads(
        text.decode("utf-8"),  # json itself would guess another encoding, and take a byte order mark
        object_pairs_hook=_no_duplicates,
        parse_constant=_no_constant,
        parse_float=_float,
        parse_int=_integer,
    )
    if not isinstance(entries, dict):
        raise ValueError("the header is not an object")
    if b"\\u" in text:
        json.dumps(entries, ensure_ascii=False).encode("utf-8")  # raises for half a surrogate pair
    return entries


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"the key {next(name for name, count in counts.items() if count > 1)!r} stands twice")
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} is out of range")
    return value


def _integer(text: str) -> int | float:
    """What no 64 bits hold is a float to the library, and so no size; -0 too."""
    value = int(text)
    return value if text != "-0" and -(1 << 63) <= value <= LARGEST else _float(text)


def _metadata(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError("__metadata__ must map strings to strings")
    return value


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorRange:
    if not isinstance(entry, dict) or not entry.keys() >= {*FIELDS}:
        raise ValueError(f"{name}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = (entry[field] for field in FIELDS)
    if not isinstance(dtype, str):
        raise ValueError(f"{name}: the dtype {dtype!r} is no name")
    if not _naturals(shape):
        raise ValueError(f"{name}: shape {shape!r} is not a list of sizes")
    if not _naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"{name}: data_offsets {offsets!r} are not two positions")
    start, stop = offsets
    bits = DTYPE_BITS.get(dtype)
    if bits is not None and 8 * (stop - start) != (takes := _bits(name, shape, bits)):
        raise ValueError(f"{name}: {dtype} {shape} takes {takes / 8:.16g} bytes, data_offsets give it {stop - start}")
    if stop < start:
        raise ValueError(f"{name}: data_offsets {offsets} run backwards")
    return TensorRange(path, dtype, tuple(shape), data_start + start, stop - start)


def _bits(name: str, shape: list[int], each: int) -> int:
    """Bits that a tensor takes, counted in 64 bits as the library does; a size of 0 behind the overflow is too late."""
    values = 1
    for size in (*shape, each):
        values *= size
        if values > LARGEST:
            raise ValueError(f"{name}: shape {shape} has more values than can be counted")
    return values


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_coverage(path: Path, tensors: Mapping[str, TensorRange], start: int, size: int) -> None:
    position = start
    for name, tensor in tensors.items():
        if tensor.offset != position:
            kind = (
                "overlaps the tensor before it, which" if tensor.offset < position else "leaves a gap: what is before"
            )
            raise CheckpointError(
                f"{path}: damaged safetensors header: {name} starts at byte {tensor.offset} and {kind} "
                f"ends at byte {position}; download or save the file again"
            )
        position += tensor.nbytes
    if position > size:
        raise CheckpointError(
            f"{path}: truncated: the header describes {position} bytes, the file has {size} "
            f"({position - size} missing); download it again"
        )
    if position < size:
        raise CheckpointError(
            f"{path}: {size - position} bytes follow the last tensor, which the format does not allow: the tensors end "
            f"at byte {position}, the file at {size}. Something was appended, or the file was written over a longer "
            "one; save it again"
        )
