"""Reads headers of safetensors files: names, dtypes, shapes and byte ranges, but no tensor.

Format: 8 bytes little-endian header length, the header as JSON, then the tensors' bytes without gaps
(https://github.com/huggingface/safetensors#format).
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from ..schemas.block_types import BLOCK_TYPES, SCALED_TYPES
from ..schemas.dtypes import DTYPES
from ..schemas.errors import CheckpointError, ConversionError
from ..schemas.json_text import load_object
from ..schemas.limits import MAX_HEADER_BYTES, MAX_HEADER_ITEMS
from ..schemas.tensors import Shape
from .open_file import opened

FIELDS = ("dtype", "shape", "data_offsets")
LARGEST = (1 << 64) - 1  # size; the library counts values and bits in 64 bits
LFS_POINTER = b"version https://git-lfs"
STARTS: Mapping[bytes, str] = {
    LFS_POINTER: "a Git LFS pointer, not the weights; fetch them with `git lfs pull`",
    b"PK\x03\x04": "a pickled checkpoint (a zip archive of torch.save), not a safetensors file",
    b"\x80": "a pickle, not a safetensors file",
    b"GGUF": "a GGUF file, not a safetensors file; convert it with `cascadekit convert` first",
    b"\x89HDF": "an HDF5 file, which is not supported; get the weights as safetensors",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"7z\xbc\xaf": "a 7-Zip archive; unpack it first",
    b"<": "a web page or XML, not weights; download the file itself",
    b"{": "JSON text, not weights; give the weights file it belongs to",
    **dict.fromkeys((b"\x89PNG", b"\xff\xd8\xff", b"RIFF"), "a picture, not weights; give a weights file"),
    b"\x08": "an ONNX graph or a file like one, not weights; give the weights file beside it",
}

TEXT = (*b"\t\n\r", *range(ord(" "), ord("~") + 1))


@dataclass(frozen=True)
class Scale:
    """The factors of a tensor's values: one for every `group` values in their order, or a single one (group 0).

    A stored value is looked up in `table`, if there is one; less `minus`, times its factor, times `last`, plus `plus`
    and `added`. `minus` and `plus` have a number for each factor. The result is rounded to `rounded`, if that names a
    dtype.

    With `tiles` (rows, factors of a row), factors are stored in the tiles of cuBLAS. `overall` is a further factor of
    all values. `first` is the number of the tensor's first value among those that `factors` are for. Factors may have
    a scale themselves.

    `kind` names the format. `parts` has the tensors to copy with the weight where the format is kept, by the endings
    that they add to the layer's name. `settings` is the JSON that describes the layer."""

    factors: "TensorRange"
    group: int = 0
    tiles: tuple[int, int] | None = None
    overall: "TensorRange | None" = None
    first: int = 0
    table: "TensorRange | None" = None
    minus: "TensorRange | None" = None
    plus: "TensorRange | None" = None
    added: float = 0.0
    last: float = 1.0
    rounded: str = ""
    kind: str = ""
    parts: tuple[tuple[str, "TensorRange"], ...] = ()
    settings: str = ""

    @property
    def is_product(self) -> bool:
        """True when a value is the stored number times its factor."""
        return not (self.table or self.minus or self.plus or self.last != 1 or self.added or self.rounded)

    @property
    def nbytes(self) -> int:
        """Bytes of the factors and of all other numbers that belong to the tensor's values."""
        tensors = (self.factors, self.overall, self.minus, self.plus)
        own = sum(tensor.nbytes for tensor in tensors if tensor)
        return own + (self.factors.scale.nbytes if self.factors.scale else 0)


@dataclass(frozen=True)
class TensorRange:
    """A tensor's bytes: `nbytes` from `offset` in the file at `path`; dtype in safetensors' spelling (F32, BF16).

    When `transposed`, the file has the transpose of the matrix, of shape [shape[1], shape[0]]. With a `scale`, the
    stored values are to be multiplied by its factors."""

    path: Path
    dtype: str
    shape: Shape
    offset: int
    nbytes: int
    transposed: bool = False
    scale: Scale | None = None

    def rows(self, start: int, stop: int, shape: Shape) -> "TensorRange":
        """Return the bytes of rows `start:stop` along the first axis, as a tensor of `shape`; it is not transposed.

        Raises ConversionError where a block of values has parts of two rows."""
        row = self.nbytes // self.shape[0]
        kind = BLOCK_TYPES.get(self.dtype) or SCALED_TYPES.get(self.dtype)
        if kind and (self.nbytes % self.shape[0] or row % kind.nbytes):
            raise ConversionError(f"{self.path}: blocks of {self.dtype} go beyond the rows of shape {list(self.shape)}")
        values = math.prod(self.shape[1:])
        scale = self.scale and replace(self.scale, first=self.scale.first + start * values)
        return replace(self, shape=shape, offset=self.offset + start * row, nbytes=(stop - start) * row, scale=scale)


@dataclass(frozen=True)
class Header:
    """The header of a weights file; its tensors are in the order of their bytes."""

    path: Path
    tensors: dict[str, TensorRange]
    metadata: dict[str, str] = field(default_factory=dict)
    gguf: bool = False  # whether the file is a GGUF file

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file, as `header_in` does."""
    with opened(path) as file:
        return header_in(file, path, os.fstat(file.fileno()).st_size)


def header_in(file: BinaryIO, path: Path, size: int) -> Header:
    """Read the header at the beginning of `file` and check it against the file's `size` in bytes; no tensor is read.

    Headers that the safetensors library accepts are accepted, except for a name that occurs twice, which the format
    forbids. Unknown dtypes are accepted too. Raises CheckpointError for all else; the message says what the file is
    instead, or where it is damaged."""
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
    if all(byte in TEXT for byte in start):
        return "text, not a safetensors file; give a weights file"
    return (
        f"not a safetensors file: the first 8 bytes announce a header of {length} bytes "
        f"(expected 2 to {MAX_HEADER_BYTES}); give a weights file, or download this one again"
    )


def _parse(text: bytes) -> dict[str, Any]:
    """Parse the header as strictly as the library does."""
    items = sum(map(text.count, (b",", b"[", b"{")))
    if items > MAX_HEADER_ITEMS:
        raise ValueError(f"it has {items} items (at most {MAX_HEADER_ITEMS} are read)")
    # json itself would guess another encoding, and take a byte order mark.
    entries = load_object(text.decode("utf-8"), strict=True, parse_float=_float, parse_int=_integer)
    if b"\\u" in text:
        json.dumps(entries, ensure_ascii=False).encode("utf-8")  # raises for half a surrogate pair
    return entries


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} is out of range")
    return value


def _integer(text: str) -> int | float:
    """Read a number beyond 64 bits, or -0, as a float, as the library does; a float is not a size."""
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
        raise ValueError(f"{name}: the dtype {dtype!r} is not a name")
    if not naturals(shape):
        raise ValueError(f"{name}: shape {shape!r} is not a list of sizes")
    if not naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"{name}: data_offsets {offsets!r} are not two positions")
    start, stop = offsets
    known = DTYPES.get(dtype)
    if known and 8 * (stop - start) != (takes := _bits(name, shape, known.bits)):
        raise ValueError(f"{name}: {dtype} {shape} takes {takes / 8:.16g} bytes, data_offsets give it {stop - start}")
    if stop < start:
        raise ValueError(f"{name}: data_offsets {offsets} run backwards")
    return TensorRange(path, dtype, tuple(shape), data_start + start, stop - start)


def _bits(name: str, shape: list[int], each: int) -> int:
    """Count the bits of a tensor in 64 bits as the library does. A size of 0 after an overflow does not help."""
    values = 1
    for size in (*shape, each):
        values *= size
        if values > LARGEST:
            raise ValueError(f"{name}: shape {shape} has more values than can be counted")
    return values


def naturals(value: Any) -> bool:
    """True for a list of whole numbers, none of them negative."""
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
