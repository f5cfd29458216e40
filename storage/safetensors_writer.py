"""The one writer of weights files: values are copied in the kernel, cast, transposed or calculated in blocks.

``write_safetensors`` and ``write_gguf`` write a file from plans. ``new_safetensors`` opens a file whose tensors the
caller fills in any order. Memory is bounded by a few blocks for each thread, however large the tensors are.
"""

import errno
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, Protocol

from ..schemas.block_types import BLOCK_TYPES, WRITTEN
from ..schemas.callbacks import Progress
from ..schemas.casts import castable
from ..schemas.dtypes import FLOATS, FP8
from ..schemas.errors import ConversionError
from ..schemas.messages import listed
from ..schemas.tensors import Shape
from .content_digest import EMPTY, PieceDigests
from .file_ranges import copy_range, merged, write_all, write_lines
from .gguf_file import encode_gguf
from .safetensors_plan import Counts, PlacedCalculatedRange, PlacedRange, TensorPlan, placed
from .threads import CAST_THREADS, run_in_order

if TYPE_CHECKING:  # numpy is not needed to copy
    from .cast import Array

FLUSH_PAUSE = 0.05  # seconds between two flushes


class DescribedTensor(Protocol):
    """A tensor as a header describes it."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> Shape: ...
    @property
    def nbytes(self) -> int: ...


def write_safetensors(
    path: Path,
    tensors: Mapping[str, TensorPlan],
    metadata: Mapping[str, str],
    progress: Progress | None = None,
    *,
    allow_overflow: bool = False,
    overflow_advice: str = "",
) -> Counts:
    """Write a safetensors file from plans, in the order of `tensors`; the caller renames it into its place.

    Returns by tensor how many values became infinite by a cast, and how many were NaN or infinite before. The file is
    on disk (fsync) when this function returns. `progress` is called with bytes of tensors. The function takes about
    100 MB of memory, and the two largest calculated blocks.

    Raises ConversionError if the disk is full, a source cannot be read, or a dtype cannot be cast; the caller then
    removes the file. Finite values that became infinite are such an error too unless `allow_overflow` is set.
    `overflow_advice` replaces the advice of that message where the caller has no such argument."""
    _check_castable(tensors)
    with new_safetensors(path, tensors, metadata) as out:
        counts = _fill(out, tensors, progress)
    return counts if allow_overflow else _finite(counts, path, tensors, overflow_advice)


def write_gguf(
    path: Path,
    tensors: Mapping[str, TensorPlan],
    metadata: Mapping[str, str | int],
    progress: Progress | None,
    *,
    allow_overflow: bool,
) -> Counts:
    """Write a GGUF file from plans, as `write_safetensors` does. Numbers of the metadata are written as uint32."""
    _check_castable(tensors)
    header, places = encode_gguf(tensors, metadata)
    end = max((places[name] + plan.nbytes for name, plan in tensors.items()), default=len(header))
    with _new_file(path, header, places, end) as out:
        counts = _fill(out, tensors, progress)
    return counts if allow_overflow else _finite(counts, path, tensors)


def _fill(out: "NewSafetensors", tensors: Mapping[str, TensorPlan], progress: Progress | None) -> Counts:
    """Write the values of all tensors; ranges that are copied come first."""
    ranges = list(placed(tensors, out.places))
    from_files = [each for each in ranges if isinstance(each, PlacedRange)]
    for copied in merged(from_files):
        copy_range(copied, out.file, progress, out.wrote)
    counts = Counts()
    if any(each.computed for each in from_files):
        from .cast_ranges import cast_placed  # imports numpy

        counts = cast_placed(from_files, out.file, progress, out.wrote)
    _calculate([each for each in ranges if isinstance(each, PlacedCalculatedRange)], out, progress)
    return counts


@dataclass(frozen=True)
class NewSafetensors:
    """A weights file in the making: its descriptor, the byte at which each tensor begins, and the digest of its
    passport."""

    path: Path
    file: int
    places: Mapping[str, int]
    pieces: PieceDigests | None = None

    def wrote(self, at: int, nbytes: int) -> None:
        """Let bytes with their final values be hashed while others are written. Calling this is optional."""
        if self.pieces:
            self.pieces.wrote(at, nbytes)

    def write(self, name: str, values: "Array", at: int = 0) -> None:
        """Write a contiguous array `at` bytes after the beginning of the tensor `name`."""
        write_all(self.file, values.reshape(-1), self.places[name] + at)

    def write_lines(self, name: str, lines: "Array", at: int, stride: int) -> None:
        """Write the rows of a contiguous matrix, each `stride` bytes after the row before it."""
        write_lines(self.file, lines, self.places[name] + at, stride)


@contextmanager
def new_safetensors(
    path: Path, tensors: Mapping[str, DescribedTensor], metadata: Mapping[str, str]
) -> Iterator[NewSafetensors]:
    """A new file with its header. The caller writes the values of the `tensors`; unwritten values are zero.

    Disk space is reserved at once, and a thread flushes written data meanwhile. Where the header has a passport, its
    digest is filled in. The file is on disk (fsync) when the block ends. Raises ConversionError for every OSError in
    the block: the disk is full, or a source cannot be read."""
    header = encode_header(tensors, metadata)
    places, end = {}, len(header)
    for name, tensor in tensors.items():
        places[name], end = end, end + tensor.nbytes
    with _new_file(path, header, places, end) as out:
        yield out


@contextmanager
def _new_file(path: Path, header: bytes, places: Mapping[str, int], end: int) -> Iterator[NewSafetensors]:
    """A new file of `end` bytes that begins with `header`; see `new_safetensors`."""
    try:
        with path.open("w+b") as out:
            reserve(out.fileno(), end)
            out.truncate(end)  # so that zeros need not be written, where nothing could be reserved
            out.write(header)
            out.flush()
            hashing = PieceDigests(out.fileno(), len(header), end) if EMPTY in header else nullcontext()
            with _flushing(out.fileno()), hashing as pieces:
                yield NewSafetensors(path, out.fileno(), places, pieces)
                if pieces:
                    pieces.fill_in()
            os.fsync(out.fileno())
    except OSError as error:
        raise ConversionError(what_failed(path, end, error)) from error


def encode_header(tensors: Mapping[str, DescribedTensor], metadata: Mapping[str, str]) -> bytes:
    """Return the header of a file that has `tensors` one after another, padded with spaces to a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, tensor in tensors.items():
        offsets = [position, position + tensor.nbytes]
        entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        position += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _calculate(ranges: Iterable[PlacedCalculatedRange], out: NewSafetensors, progress: Progress | None) -> None:
    """Calculate and write ranges in worker threads, each of which has one range at a time."""
    tasks = ((each, partial(_write_blocks, each, out)) for each in ranges)
    with ThreadPoolExecutor(CAST_THREADS) as pool:
        for each, nbytes in run_in_order(pool, tasks):
            out.wrote(each.at, nbytes)
            if progress:
                progress(nbytes)


def _write_blocks(placed_range: PlacedCalculatedRange, out: NewSafetensors) -> int:
    """Write the blocks of a range; returns their bytes."""
    at = placed_range.at
    for block in placed_range.range.blocks():
        write_all(out.file, block.reshape(-1), at)
        at += block.nbytes
    if (found := at - placed_range.at) != placed_range.range.nbytes:
        raise ConversionError(
            f"{out.path}: {placed_range.name}: {found} bytes were calculated instead of {placed_range.range.nbytes}; "
            "this is a bug, report it"
        )
    return found


@contextmanager
def _flushing(target: int) -> Iterator[None]:
    """Flush written data to disk repeatedly, in a thread.

    Without this thread the kernel begins only when it has gigabytes, and the disk idles until then. Raises the OSError
    of a flush when the block ends: the kernel reports an error once, so a later fsync would miss it."""
    done = Event()
    with ThreadPoolExecutor(1) as pool:
        flushes = pool.submit(_flush_until, done, target)
        try:
            yield
        finally:
            done.set()
        flushes.result()


def _flush_until(done: Event, target: int) -> None:
    while not done.wait(FLUSH_PAUSE):
        os.fdatasync(target)


def _check_castable(tensors: Mapping[str, TensorPlan]) -> None:
    """Raise ConversionError for the first range that cannot become the dtype of its tensor."""
    for name, plan in tensors.items():
        for source in plan.source_ranges:
            if source.dtype in BLOCK_TYPES and source.dtype == plan.dtype and not source.transposed:
                continue
            if source.scale is not None and plan.dtype not in (*FLOATS, *WRITTEN):
                raise ConversionError(
                    f"{source.path}: {name}: {'scaled fp8' if source.dtype in FP8 else source.dtype} (a weight and the "
                    "scales to multiply it by) cannot be stored in this layout; choose a float dtype, such as "
                    'dtype="bf16"'
                )
            if source.transposed and (
                (source.scale and source.scale.group) or {source.dtype, plan.dtype} & {*BLOCK_TYPES}
            ):
                raise ConversionError(
                    f"{source.path}: {name}: {source.dtype} is stored transposed, and blocks of {plan.dtype} go along "
                    "rows; write the tensor as float"
                )
            if source.dtype != plan.dtype and not castable(source.dtype, plan.dtype):
                raise ConversionError(
                    f"{source.path}: {name}: {source.dtype} cannot become {plan.dtype}; "
                    f"only {', '.join(FLOATS)} are cast"
                )


def what_failed(path: Path, total: int, error: OSError) -> str:
    """Return the message for an error while `total` bytes were to be written to `path`."""
    if error.filename not in (None, str(path)):
        return f"{error.filename}: cannot be read: {error.strerror}"
    return f"{path}: cannot be written ({total} bytes needed): {error.strerror}"


def _finite(counts: Counts, path: Path, tensors: Mapping[str, TensorPlan], advice: str = "") -> Counts:
    """Return `counts`. Raises ConversionError when finite values became infinite."""
    overflows = counts.overflows
    if not overflows:
        return counts
    worst = [f"{name} ({count} in {tensors[name].dtype})" for name, count in overflows.most_common()]
    dtypes = {tensors[name].dtype for name in overflows}
    wider = 'dtype="bf16", whose range is that of float32' if dtypes == {"F16"} else "a wider dtype"
    advice = advice or f"try {wider}, or keep the infinities with allow_overflow=True"
    raise ConversionError(f"{path.name}: {overflows.total()} finite values become infinite: {listed(worst)}; {advice}")


def reserve(target: int, total: int) -> None:
    """Reserve `total` bytes of disk for an open file, so that a full disk is found before the first byte is copied.

    Raises OSError (ENOSPC) if they are not free."""
    # Asked first: where a file system cannot reserve, the C library fills the file with writes until none is left.
    disk = os.fstatvfs(target)
    free = disk.f_bavail * disk.f_frsize
    if disk.f_blocks and free < total:  # file systems that do not count say 0 blocks
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, {free} bytes are free")
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(target, 0, total)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # both mean: not on this file system
            raise
