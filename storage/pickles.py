"""Checkpoints that torch pickled (.pt, .ckpt, .bin): read by torch's restricted unpickler, never by pickle itself.

A zip written by torch.save holds each tensor's bytes uncompressed. So the result is the same as for a safetensors file:
byte ranges. torch maps the file into memory and reads only the small pickle, whose size the zip's directory gives.
"""

import mmap
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, BinaryIO

from ..schemas.dtypes import DTYPES
from ..schemas.errors import CheckpointError, reraise_interrupt
from ..schemas.limits import MAX_PICKLE_BYTES, MAX_PICKLE_DEPTH, MAX_PICKLE_ENTRIES, MAX_PICKLE_NAME
from .install_hint import install_hint
from .pickle_zip import ZipEntry, read_directory
from .safetensors_reader import Header, TensorRange

if TYPE_CHECKING:
    import torch

ZIP = b"PK\x03\x04"  # the first bytes of a file that torch 1.6 or later saved
PICKLE_NAME = "data.pkl"
SAMPLE = 256  # bytes of each tensor compared with the file, at both ends
ADVICE = "load it where you trust it, and save its tensors as safetensors"

_NAMES = {dtype.torch: name for name, dtype in DTYPES.items() if dtype.torch}


def read_pickle(path: Path) -> Header:
    """Return the tensors of a pickled checkpoint as byte ranges. Dots join the keys of nested dictionaries and lists.

    Needs torch. Raises CheckpointError for anything but tensors and plain values, and for tensors that are not stored
    as plain bytes. The same goes for files by torch before 1.6, and for files beyond the limits."""
    try:
        import torch
    except ImportError as error:
        reraise_interrupt(error)
        raise CheckpointError(f"{path}: reading pickled weights takes torch: {install_hint('parity')}") from error
    storages = _storages(path)
    try:
        content = _load(path)
    except Exception as error:  # the unpickler, the zip reader and the mapping have different ones
        raise CheckpointError(f"{path}: refused: {_why_refused(error)}; {ADVICE}") from error
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in _flatten(path, content):
        if name in tensors:
            raise CheckpointError(f"{path}: two tensors are called {name}; {ADVICE}")
        tensors[name] = _plain(path, name, tensor)
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors")
    return Header(path, _ranges(path, tensors, storages))


def _load(path: Path) -> Any:
    """Load the file with torch's restricted unpickler, its tensors mapped into memory."""
    import torch

    if not path.name.endswith(".safetensors"):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    with TemporaryDirectory(prefix="cascadekit-pickle-") as scratch:  # torch 2.13 decides by the suffix, so load a link
        named = Path(scratch, "checkpoint.pt")
        named.symlink_to(path.absolute())
        return torch.load(named, map_location="cpu", mmap=True, weights_only=True)


def _storages(path: Path) -> list[ZipEntry]:
    """Return the entries with tensors. Raises CheckpointError unless the archive can be loaded in little memory."""
    with path.open("rb") as file:
        begins_as_zip = file.read(len(ZIP)) == ZIP
    if not begins_as_zip:
        raise CheckpointError(f"{path}: not saved by torch 1.6 or later, but an older pickle; {ADVICE}")
    entries = read_directory(path)
    pickles = [entry for name, entry in entries.items() if name.rpartition("/")[2] == PICKLE_NAME]
    if len(pickles) != 1:
        raise CheckpointError(f"{path}: a zip archive, but not a checkpoint of torch: it has {len(pickles)} data.pkl")
    packed = [entry for entry in entries.values() if entry.compressed]
    if packed:
        raise CheckpointError(f"{path}: {packed[0].name} in it is compressed, which torch.save never does; {ADVICE}")
    if pickles[0].nbytes > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{path}: its {PICKLE_NAME} has {pickles[0].nbytes} bytes; at most {MAX_PICKLE_BYTES} are read; {ADVICE}"
        )
    root = pickles[0].name.removesuffix(PICKLE_NAME) + "data/"
    return [entry for name, entry in entries.items() if name.startswith(root) and entry.nbytes]


def _why_refused(error: Exception) -> str:
    """Say why torch refused the file, without its advice to load the file in an unsafe way."""
    text = str(error)
    found = re.search(r"Unsupported (?:global: GLOBAL|class) ([\w.]+)", text)
    if found:
        return f"it has {found[1]} besides tensors and plain values, and loading that may run code"
    lines = [line for line in text.splitlines() if "nsupported" in line] or text.splitlines() or [type(error).__name__]
    return f"torch's restricted unpickler refuses it ({lines[0].strip()[:200]})"


def _flatten(path: Path, content: Any) -> Iterator[tuple[str, Any]]:
    """Yield every tensor with the keys that lead to it. One dictionary may be in several places, so the number of
    visited entries is bounded."""
    waiting = [("", content, 0)]
    looked_at = 0
    while waiting:
        name, value, depth = waiting.pop()
        if hasattr(value, "untyped_storage"):
            yield name, value
            continue
        inside: Collection[tuple[Any, Any]] = ()
        if isinstance(value, Mapping):
            inside = value.items()
        elif isinstance(value, list | tuple):
            inside = list(enumerate(value))
        looked_at += len(inside)
        if looked_at > MAX_PICKLE_ENTRIES:
            raise CheckpointError(f"{path}: refused: its dictionaries have over {MAX_PICKLE_ENTRIES} entries; {ADVICE}")
        if depth > MAX_PICKLE_DEPTH:
            raise CheckpointError(
                f"{path}: refused: its dictionaries are over {MAX_PICKLE_DEPTH} deep, or one contains itself; {ADVICE}"
            )
        for key, item in reversed(list(inside)):
            below = f"{name}.{key}" if depth else str(key)
            if len(below) > MAX_PICKLE_NAME:
                raise CheckpointError(f"{path}: refused: the name {below[:50]}... is too long; {ADVICE}")
            waiting.append((below, item, depth + 1))


def _plain(path: Path, name: str, tensor: "torch.Tensor") -> "torch.Tensor":
    """Return the tensor if its values are plain and contiguous. Raises CheckpointError that names its kind if not."""
    kinds = {
        "nested": tensor.is_nested,
        "quantised": tensor.is_quantized,
        "without values (on the meta device)": tensor.is_meta,
        "sparse": not tensor.is_nested and str(tensor.layout) != "torch.strided",
    }
    kind = next((kind for kind, holds in kinds.items() if holds), None)
    if kind is None and type(tensor).__name__ not in ("Tensor", "Parameter", "Buffer"):
        kind = f"a {type(tensor).__name__}"
    if kind is None and (tensor.is_conj() or tensor.is_neg() or not tensor.is_contiguous()):
        kind = f"a view that is conjugated, negated or not contiguous (strides {list(tensor.stride())})"
    if kind is not None:
        raise CheckpointError(f"{path}: {name} is {kind}, which is not supported; {ADVICE}")
    return tensor.detach()


def _ranges(path: Path, tensors: Mapping[str, "torch.Tensor"], storages: list[ZipEntry]) -> dict[str, TensorRange]:
    """Return the byte range of each tensor."""
    origin = _origin(path, tensors.values(), storages)
    ranges = {}
    with path.open("rb") as file:
        for name, tensor in tensors.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            nbytes = tensor.numel() * tensor.element_size()
            offset = tensor.data_ptr() - origin if nbytes else 0
            ranges[name] = TensorRange(path, _NAMES.get(dtype, dtype), tuple(tensor.shape), offset, nbytes)
            _check_sample(path, file, name, tensor, ranges[name])
    return ranges


def _origin(path: Path, tensors: Collection["torch.Tensor"], storages: list[ZipEntry]) -> int:
    """Return the address where the file's first byte is mapped.

    It is the start of a page from which each storage is as far away as an entry of the same size in the file."""
    mapped = {
        (storage.data_ptr(), storage.nbytes()) for storage in (t.untyped_storage() for t in tensors) if storage.nbytes()
    }
    if not mapped:
        return 0
    places = {(entry.offset, entry.nbytes) for entry in storages}
    first, nbytes = min(mapped)
    for offset, size in sorted(places):
        origin = first - offset
        if size == nbytes and origin % mmap.PAGESIZE == 0 and {(at - origin, n) for at, n in mapped} <= places:
            return origin
    raise CheckpointError(f"{path}: its tensors are not where its zip directory says; {ADVICE}")


def _check_sample(path: Path, file: BinaryIO, name: str, tensor: "torch.Tensor", found: TensorRange) -> None:
    """Raise CheckpointError unless both ends of the tensor have the bytes that torch reads there."""
    import torch

    flat = tensor.reshape(-1).view(torch.uint8)
    for start in (0, max(0, found.nbytes - SAMPLE)):
        file.seek(found.offset + start)
        wanted = bytes(flat[start : start + SAMPLE].numpy())
        if file.read(len(wanted)) != wanted:
            raise CheckpointError(f"{path}: {name} is not where torch maps it in the file; {ADVICE}")
