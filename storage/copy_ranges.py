"""Copies ranges of files into another file, inside the kernel where it can."""

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from .safetensors_header import Progress
from .tensor_plans import Piece

COPY_BLOCK = 1 << 24


def merged(pieces: Iterable[Piece]) -> Iterator[tuple[Path, int, int, int]]:
    """The ranges to copy, as source, offset, size and position in the output; adjacent ones as one."""
    current: tuple[Path, int, int, int] | None = None
    for piece in pieces:
        if piece.computed:
            continue
        if current and _follows(piece, *current):
            current = (*current[:2], current[2] + piece.part.nbytes, current[3])
        else:
            if current:
                yield current
            current = (piece.part.path, piece.part.offset, piece.part.nbytes, piece.at)
    if current:
        yield current


def _follows(piece: Piece, source: Path, offset: int, nbytes: int, at: int) -> bool:
    part = piece.part
    return part.path == source and part.offset == offset + nbytes and piece.at == at + nbytes


def copy_range(source: Path, offset: int, nbytes: int, at: int, target: int, progress: Progress | None) -> None:
    """Copy `nbytes` from `offset` of `source` to `at` in `target`, inside the kernel where it can."""
    os.lseek(target, at, os.SEEK_SET)
    ways = _copiers()
    with source.open("rb") as file:
        while nbytes:
            try:
                done = ways[0](file.fileno(), offset, min(nbytes, COPY_BLOCK), target)
            except OSError:
                if len(ways) == 1:
                    raise
                del ways[0]  # another file system, or one without the call
                continue
            if not done:
                raise ended_early(source, nbytes)
            offset, nbytes = offset + done, nbytes - done
            if progress:
                progress(done)


def _copiers() -> list[Callable[[int, int, int, int], int]]:
    """Every way of copying this system has, fastest first; each moves the position in the target."""
    ways = {"copy_file_range": _range_copy, "sendfile": _send_copy, "pread": _buffered_copy}
    return [copy for call, copy in ways.items() if hasattr(os, call)]


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


def ended_early(source: Path, missing: int) -> OSError:
    return OSError(errno.EIO, f"the file ended {missing} bytes too early; was it changed meanwhile?", str(source))
