"""Checkpoints that torch pickled (.pt, .ckpt, .bin): read by torch's restricted unpickler, never by pickle itself.

A zip written by torch.save holds each tensor's bytes uncompressed, so that what comes out is what a safetensors
header gives: byte ranges of the file. torch maps the file into memory; nothing is read but the small pickle.
"""

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..schemas.errors import CheckpointError, reraise_interrupt
from .safetensors_file import Header, TensorRange

ZIP, PICKLE = b"PK\x03\x04", b"\x80"  # how a file of torch.save begins: since 1.6 as a zip, before as a bare pickle
LOCAL_HEADER = 30  # bytes of a zip entry's header before its name
SAMPLE = 256  # bytes of each tensor compared with the file, at both ends

_DTYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}


def is_pickle(path: Path) -> bool:
    """Whether the file begins as what torch.save writes. Raises CheckpointError when it cannot be read."""
    try:
        with path.open("rb") as file:
            start = file.read(len(ZIP) + 5)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    # A safetensors file begins with the length of its header, which may have these bytes too; its ninth is a brace.
    return start.startswith((ZIP, PICKLE)) and start[8:9] != b"{"


def read_pickle(path: Path) -> Header:
    """The tensors of a pickled checkpoint as byte ranges, nested dictionaries flattened with dots.

    Needs torch. Raises CheckpointError for files that hold anything but tensors and plain values, that torch.save
    wrote before version 1.6, or whose tensors do not lie as they are in the file."""
    try:
        import torch
    except ImportError as error:
        reraise_interrupt(error)
        raise CheckpointError(
            f"{path}: reading pickled weights takes torch: pip install 'cascadekit[parity]'"
        ) from error
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path}: not a checkpoint that torch 1.6 or later saved; load it where you trust it and save safetensors"
        )
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # the unpickler, the zip reader and the mapping each have their own
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: refused, as it holds more than tensors or is damaged: {reason}; get a .safetensors file"
        ) from error
    tensors = dict(_flatten(content))
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors")
    return Header(path, _ranges(path, tensors))


def _flatten(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _flatten(value, f"{prefix}{key}.")
    elif hasattr(content, "untyped_storage"):
        yield prefix.removesuffix("."), content


def _ranges(path: Path, tensors: Mapping[str, Any]) -> dict[str, TensorRange]:
    """Where each tensor lies. All storages are slices of one mapping of the file, so that the distance between two in
    memory is their distance in the file; the first in the pickle is called 0 in the zip, which gives the origin."""
    origin = min(t.untyped_storage().data_ptr() for t in tensors.values()) - _first_byte(path)
    ranges = {}
    with path.open("rb") as file:
        for name, tensor in tensors.items():
            dtype = _DTYPES.get(str(tensor.dtype))
            if dtype is None or not tensor.is_contiguous():
                raise CheckpointError(f"{path}: {name} is {tensor.dtype}, strides {tensor.stride()}; cannot be read")
            offset = tensor.data_ptr() - origin
            nbytes = tensor.numel() * tensor.element_size()
            ranges[name] = TensorRange(path, dtype, tuple(tensor.shape), offset, nbytes)
            _check_sample(path, file, name, tensor, ranges[name])
    return ranges


def _first_byte(path: Path) -> int:
    """The position of the first byte of the storage that lies first in the file."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entries = [entry for entry in archive.infolist() if "/data/" in entry.filename and entry.file_size]
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or not entries:
            raise CheckpointError(f"{path}: its tensors are compressed; unpack it or get a .safetensors file")
        first = min(entries, key=lambda entry: entry.header_offset)
        file.seek(first.header_offset + 26)
        lengths = file.read(4)
    name, extra = (int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
    return first.header_offset + LOCAL_HEADER + name + extra


def _check_sample(path: Path, file: Any, name: str, tensor: Any, found: TensorRange) -> None:
    """The bytes at both ends must be what torch reads there; a file laid out otherwise is refused, not misread."""
    import torch

    flat = tensor.reshape(-1).view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)
    for start in (0, max(0, found.nbytes - SAMPLE)):
        file.seek(found.offset + start)
        wanted = bytes(flat[start : start + SAMPLE].numpy())
        if file.read(len(wanted)) != wanted:
            raise CheckpointError(f"{path}: {name} does not lie in the file as torch maps it; save it as safetensors")
