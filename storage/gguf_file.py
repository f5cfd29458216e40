"""Reads and encodes the headers of GGUF files: metadata, and the name, shape, type and place of each tensor.

Format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): the magic number, a version, two counts, the
metadata, a description of each tensor, then the tensors, each at a multiple of the alignment. Shapes are stored with
the last axis first. Numbers are little endian."""

import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..schemas.block_types import BLOCK_TYPES, GGML_TYPES, PLAIN_TYPES, nbytes_of
from ..schemas.errors import CheckpointError
from ..schemas.limits import MAX_HEADER_BYTES, MAX_HEADER_ITEMS
from ..schemas.messages import LONG
from ..schemas.tensors import Shape
from .open_file import opened
from .safetensors_plan import TensorPlan
from .safetensors_reader import Header, TensorRange, naturals

MAGIC = b"GGUF"
VERSION, VERSIONS = 3, (2, 3)
ALIGNMENT = 32
MAX_AXES = 4
STRING, ARRAY, UINT32 = 8, 9, 4
NUMBERS: Mapping[int, str] = {
    **{0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"},
    **{10: "<Q", 11: "<q", 12: "<d"},
}
ARCHITECTURE = "general.architecture"
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # ComfyUI-GGUF's tools reshape tensors whose rows are too short for blocks
AGAIN = "download or save the file again"


class _Reader:
    """Takes values from the beginning of a file. Raises ValueError where the file or the header's limit ends, and
    EOFError where only the beginning of the file is at hand and ends."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size, self._limit = file, size, min(size, MAX_HEADER_BYTES)
        self._items = 0

    def at(self) -> int:
        return self._file.tell()

    def take(self, nbytes: int) -> bytes:
        if self.at() + nbytes > self._limit:
            if self._limit < self._size:
                raise ValueError(f"its header has more than {self._limit} bytes, which are not read")
            raise ValueError(f"truncated: its header goes on after byte {self._limit}, where the file ends")
        data = self._file.read(nbytes)
        if len(data) < nbytes:
            raise EOFError(f"it has {self.at()} bytes")
        return data

    def number(self, form: str = "<Q") -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, what: str) -> int:
        """Read how many items follow."""
        count: int = self.number()
        self._items += count
        if self._items > MAX_HEADER_ITEMS:
            raise ValueError(f"it announces {count} {what} (at most {MAX_HEADER_ITEMS} items are read)")
        return count

    def text(self) -> str:
        return self.take(self.number()).decode("utf-8")

    def value(self, kind: int, depth: int = 0) -> Any:
        """Read a value of metadata: a number, a text or a list."""
        if kind == STRING:
            return self.text()
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind != ARRAY or depth > 2:
            raise ValueError(f"a value of metadata has the unknown type {kind}")
        inner = self.number("<I")
        return [self.value(inner, depth + 1) for _ in range(self.count("values"))]


def read_gguf(path: Path) -> Header:
    """Read the header of a GGUF file, as `gguf_header_in` does."""
    with opened(path) as file:
        try:
            return gguf_header_in(file, path, os.fstat(file.fileno()).st_size)
        except EOFError as error:
            raise CheckpointError(f"{path}: became shorter while it was read; {AGAIN}") from error


def gguf_header_in(file: BinaryIO, path: Path, size: int) -> Header:
    """Read the header at the beginning of `file` and check it against the file's `size` in bytes; no tensor is read.

    Texts of the metadata become the header's metadata, tensors keep their order. Raises CheckpointError for a file that
    is damaged, truncated, or of a version or type that is not known. Raises EOFError when `file` has less than its
    `size` and ends within the header."""
    reader = _Reader(file, size)
    try:
        metadata, entries = _read_parts(reader)
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & alignment - 1:
            raise ValueError(f"general.alignment is {alignment!r}, expected a power of two")
        start = -(-reader.at() // alignment) * alignment
        tensors = {}
        for name, entry in entries.items():
            tensors[name] = _tensor(path, name, entry, start)
            _check_place(name, tensors[name], alignment, size)
    except (ValueError, struct.error) as error:
        raise CheckpointError(f"{path}: damaged GGUF file: {error}; {AGAIN}") from error
    for name, shape in metadata.items():
        tensor = tensors.get(name.removeprefix(ORIGINAL_SHAPE))
        if name.startswith(ORIGINAL_SHAPE) and tensor is not None:
            tensors[name.removeprefix(ORIGINAL_SHAPE)] = _reshaped(name, tensor, shape)
    texts = {key: value for key, value in metadata.items() if isinstance(value, str)}
    return Header(path, tensors, texts, gguf=True)


class _Entry(NamedTuple):
    """The description of a tensor: shape, number of its type, and bytes from the start of all tensors."""

    shape: Shape
    code: int
    offset: int


def _read_parts(reader: _Reader) -> tuple[dict[str, Any], dict[str, _Entry]]:
    """Read the metadata and the description of each tensor."""
    if reader.take(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = reader.number("<I")
    if version not in VERSIONS:
        swapped = int.from_bytes(struct.pack("<I", version), "big")
        found = f"{swapped} in big-endian order" if swapped in VERSIONS else str(version)
        raise ValueError(f"version {found} is not supported, expected {' or '.join(map(str, VERSIONS))}, little endian")
    tensors, keys = reader.count("tensors"), reader.count("keys")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = reader.text()
        metadata[key] = reader.value(reader.number("<I"))
    entries: dict[str, _Entry] = {}
    for _ in range(tensors):
        name, axes = reader.text(), reader.number("<I")
        if axes > MAX_AXES:
            raise ValueError(f"{name}: {axes} axes, expected at most {MAX_AXES}")
        if name in entries:
            raise ValueError(f"{name}: described twice")
        shape = tuple(reader.number() for _ in range(axes))[::-1]
        entries[name] = _Entry(shape, reader.number("<I"), reader.number())
    return metadata, entries


def _tensor(path: Path, name: str, entry: _Entry, start: int) -> TensorRange:
    if entry.code not in GGML_TYPES:
        known = ", ".join((*PLAIN_TYPES, *BLOCK_TYPES))
        raise ValueError(f"{name}: unknown type {entry.code}, expected that of one of {known}")
    dtype, kind = GGML_TYPES[entry.code]
    columns = entry.shape[-1] if entry.shape else 1
    if columns % kind.values:
        raise ValueError(
            f"{name}: {dtype} has blocks of {kind.values} values, expected rows of a multiple of that, found shape "
            f"{list(entry.shape)}"
        )
    nbytes = math.prod(entry.shape) // kind.values * kind.nbytes
    return TensorRange(path, dtype, entry.shape, start + entry.offset, nbytes)


def _check_place(name: str, tensor: TensorRange, alignment: int, size: int) -> None:
    if tensor.offset % alignment:
        raise ValueError(f"{name}: at byte {tensor.offset}, expected a multiple of {alignment}")
    if (end := tensor.offset + tensor.nbytes) > size:
        raise ValueError(
            f"truncated: {name} ({tensor.dtype} {list(tensor.shape)}) ends at byte {end}, the file at {size} "
            f"({end - size} missing)"
        )


def _reshaped(key: str, tensor: TensorRange, shape: Any) -> TensorRange:
    if not naturals(shape) or math.prod(shape) != math.prod(tensor.shape):
        raise CheckpointError(
            f"{tensor.path}: {key} is {str(shape)[:LONG]}, expected a shape of as many values as "
            f"{list(tensor.shape)}; {AGAIN}"
        )
    return TensorRange(tensor.path, tensor.dtype, tuple(shape), tensor.offset, tensor.nbytes)


def encode_gguf(tensors: Mapping[str, TensorPlan], metadata: Mapping[str, str | int]) -> tuple[bytes, dict[str, int]]:
    """Return the header of a GGUF file, and the byte at which each of the `tensors` begins.

    The caller fills the gaps between tensors with zeros. Whole numbers of the metadata are written as uint32."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        kind = STRING if isinstance(value, str) else UINT32
        parts += [_text(key), struct.pack("<I", kind)]
        parts.append(_text(value) if isinstance(value, str) else struct.pack("<I", value))
    codes = {name: code for code, (name, _) in GGML_TYPES.items()}
    offsets, position = {}, 0
    for name, plan in tensors.items():
        offsets[name] = position
        axes = plan.shape[::-1]
        parts += [_text(name), struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, codes[plan.dtype], position)]
        position += -(-nbytes_of(plan.dtype, math.prod(plan.shape)) // ALIGNMENT) * ALIGNMENT
    header = b"".join(parts)
    header += b"\0" * (-len(header) % ALIGNMENT)
    return header, {name: len(header) + offset for name, offset in offsets.items()}


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data
