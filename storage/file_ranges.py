"""Reads, writes and copies ranges of bytes in open files; copies happen inside the kernel where the system can."""

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..schemas.callbacks import Progress, ignored
from .safetensors_plan import PlacedRange

if TYPE_CHECKING:  # numpy is not needed to copy
    from numpy.typing import NDArray

COPY_BLOCK = 1 << 24  # most bytes of one system call

Wrote = Callable[[int, int], None]
"""Called with a byte of the target and a count, once these bytes have their final values."""


@dataclass(frozen=True)
class CopiedRange:
    """`nbytes` bytes from byte `offset` of the file `source`, to be copied to byte `at` of another file."""

    source: Path
    offset: int
    nbytes: int
    at: int

    def goes_on_with(self, other: "CopiedRange") -> bool:
        """True when `other` begins where this range ends, in both files."""
        distance = other.offset - self.offset, other.at - self.at
        return self.source == other.source and distance == (self.nbytes, self.nbytes)


def merged(ranges: Iterable[PlacedRange]) -> Iterator[CopiedRange]:
    """Yield the ranges that are copied unchanged. Neighbours in both files become one range."""
    current: CopiedRange | None = None
    for placed in ranges:
        if placed.computed:
            continue
        found = CopiedRange(placed.range.path, placed.range.offset, placed.range.nbytes, placed.at)
        if current and current.goes_on_with(found):
            current = replace(current, nbytes=current.nbytes + found.nbytes)
            continue
        if current:
            yield current
        current = found
    if current:
        yield current


def copy_range(copied: CopiedRange, target: int, progress: Progress | None, wrote: Wrote = ignored) -> None:
    """Copy a range into the open file `target`. Raises OSError, EIO if the source ends too early."""
    os.lseek(target, copied.at, os.SEEK_SET)
    offset, left = copied.offset, copied.nbytes
    copiers = _copiers()
    with copied.source.open("rb") as file:
        while left:
            try:
                done = copiers[0](file.fileno(), offset, min(left, COPY_BLOCK), target)
            except OSError:
                if len(copiers) == 1:
                    raise
                del copiers[0]  # the source is on another file system, or this file system lacks the call
                continue
            if not done:
                raise ended_early(copied.source, left)
            wrote(copied.at + copied.nbytes - left, done)
            offset, left = offset + done, left - done
            if progress:
                progress(done)


def _copiers() -> list[Callable[[int, int, int, int], int]]:
    """Return the system's functions that copy, fastest first; each moves the position in the target."""
    copiers = {"copy_file_range": _range_copy, "sendfile": _send_copy, "pread": _buffered_copy}
    return [copy for call, copy in copiers.items() if hasattr(os, call)]


def _range_copy(source: int, offset: int, nbytes: int, target: int) -> int:
    return os.copy_file_range(source, target, nbytes, offset_src=offset)


def _send_copy(source: int, offset: int, nbytes: int, target: int) -> int:
    return os.sendfile(target, source, offset, nbytes)


def _buffered_copy(source: int, offset: int, nbytes: int, target: int) -> int:
    block = os.pread(source, nbytes, offset)
    view = memoryview(block)
    while view:
        view = view[os.write(target, view) :]
    return len(block)


def read_exactly(file: FileIO, offset: int, nbytes: int) -> bytes:
    """`nbytes` bytes from byte `offset`. Raises OSError, EIO if the file ends too early."""
    data = os.pread(file.fileno(), nbytes, offset)
    while len(data) < nbytes:
        more = os.pread(file.fileno(), nbytes - len(data), offset + len(data))
        if not more:
            raise ended_early(Path(os.fsdecode(file.name)), nbytes - len(data))
        data += more
    return data


def read_lines(file: FileIO, offset: int, stride: int, count: int, nbytes: int) -> bytes:
    """`count` lines of `nbytes` bytes each; the first begins at byte `offset`, each next one `stride` bytes later."""
    if stride == nbytes:
        return read_exactly(file, offset, count * nbytes)
    return b"".join(read_exactly(file, offset + index * stride, nbytes) for index in range(count))


def write_all(target: int, values: "NDArray[Any]", at: int) -> None:
    """Write a contiguous 1-D array at byte `at`."""
    data = values.view("u1").data
    while data:
        done = os.pwrite(target, data, at)
        data, at = data[done:], at + done


def write_lines(target: int, lines: "NDArray[Any]", at: int, stride: int) -> None:
    """Write the rows of a contiguous matrix; the first at byte `at`, each next one `stride` bytes later."""
    if lines.nbytes == stride * len(lines):
        lines = lines.reshape(1, -1)
    for index, line in enumerate(lines):
        write_all(target, line, at + index * stride)


def ended_early(source: Path, missing: int) -> OSError:
    """Return the error for a source that has fewer bytes than its header describes."""
    return OSError(errno.EIO, f"the file ended {missing} bytes too early; was it changed meanwhile?", str(source))
