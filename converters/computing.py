"""Casts and transposes ranges of files into another file, block by block in worker threads."""

import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from io import FileIO
from pathlib import Path

import numpy as np

from ..schemas.tensors import Shape
from .cast import Array, cast_block
from .copying import ended_early
from .plans import Piece
from .safetensors_file import DTYPE_SIZES, Progress

CAST_BLOCK = 1 << 22  # bytes of input a thread casts at a time; memory of larger blocks is paged in anew each time
CAST_THREADS = 2

Done = tuple[int, int]  # bytes written, values that became infinite
Task = Callable[[], Done]


def compute(pieces: Iterable[Piece], target: int, progress: Progress | None) -> Counter[str]:
    """Cast and transpose what is not copied; the result counts overflows by tensor."""
    overflows: Counter[str] = Counter()
    tasks = ((piece.name, task) for piece in pieces if piece.computed for task in _tasks(piece, target))
    # Whatever ends this block waits for the workers: none may write once the file is closed.
    with ThreadPoolExecutor(CAST_THREADS) as pool:
        for name, (nbytes, overflow) in _run(pool, tasks):
            if overflow:
                overflows[name] += overflow
            if progress:
                progress(nbytes)
    return overflows


def _run(pool: ThreadPoolExecutor, tasks: Iterable[tuple[str, Task]]) -> Iterator[tuple[str, Done]]:
    """The results in order. Each task reads, computes and writes at its own place in a worker thread, so no block
    waits for another; only as many are handed out as keep the workers busy."""
    waiting: deque[tuple[str, Future[Done]]] = deque()
    for name, task in tasks:
        waiting.append((name, pool.submit(task)))
        if len(waiting) > 2 * CAST_THREADS:
            first, future = waiting.popleft()
            yield first, future.result()
    for name, future in waiting:
        yield name, future.result()


def _tasks(piece: Piece, target: int) -> Iterator[Task]:
    """A piece in blocks of at most CAST_BLOCK bytes of input (and at least one value)."""
    part = piece.part
    limit = max(1, CAST_BLOCK // DTYPE_SIZES[part.dtype])
    if part.transposed:
        for rows, columns in _tiles(part.shape, limit):
            yield partial(_transpose_tile, piece, rows, columns, target)
    else:
        for span in _cuts(part.nbytes // DTYPE_SIZES[part.dtype], limit):
            yield partial(_cast_span, piece, span, target)


def _cuts(size: int, step: int) -> Iterator[range]:
    return (range(start, min(start + step, size)) for start in range(0, size, step))


def _tiles(shape: Shape, limit: int) -> Iterator[tuple[range, range]]:
    """Rows and columns of tiles of at most `limit` values: whole rows of the output or of the source where that
    leaves the other side long, squares otherwise, so that neither is read or written in crumbs."""
    rows, columns = shape
    height = max(1, min(rows, max(math.isqrt(limit), limit // max(1, columns))))
    width = max(1, limit // height)
    return ((down, across) for down in _cuts(rows, height) for across in _cuts(columns, width))


def _cast_span(piece: Piece, span: range, target: int) -> Done:
    part, size = piece.part, DTYPE_SIZES[piece.part.dtype]
    with part.path.open("rb", buffering=0) as file:
        data = read_exactly(file, part.offset + span.start * size, len(span) * size)
    values, overflow = cast_block(data, part.dtype, piece.dtype)
    write_all(target, values, piece.at + span.start * values.itemsize)
    return values.nbytes, overflow


def _transpose_tile(piece: Piece, rows: range, columns: range, target: int) -> Done:
    """Write the given rows and columns of the tensor; in the source they are columns and rows."""
    part, size = piece.part, DTYPE_SIZES[piece.part.dtype]
    line, width = part.shape[0] * size, part.shape[1] * DTYPE_SIZES[piece.dtype]
    with part.path.open("rb", buffering=0) as file:
        start = part.offset + columns.start * line + rows.start * size
        data = read_lines(file, start, line, len(columns), len(rows) * size)
    tile, overflow = (data, 0) if part.dtype == piece.dtype else cast_block(data, part.dtype, piece.dtype)
    bits = np.frombuffer(tile, f"<u{DTYPE_SIZES[piece.dtype]}").reshape(len(columns), len(rows))
    at = piece.at + rows.start * width + columns.start * bits.itemsize
    write_lines(target, np.ascontiguousarray(bits.T), at, width)
    return bits.nbytes, overflow


def read_lines(file: FileIO, offset: int, stride: int, count: int, nbytes: int) -> bytes:
    """`count` times `nbytes`, which start `stride` bytes apart in the file."""
    if stride == nbytes:
        return read_exactly(file, offset, count * nbytes)
    return b"".join(read_exactly(file, offset + index * stride, nbytes) for index in range(count))


def write_lines(target: int, lines: Array, at: int, stride: int) -> None:
    """Each row of a contiguous matrix `stride` bytes after the row before."""
    if lines.nbytes == stride * len(lines):
        lines = lines.reshape(1, -1)
    for index, line in enumerate(lines):
        write_all(target, line, at + index * stride)


def read_exactly(file: FileIO, offset: int, nbytes: int) -> bytes:
    data = os.pread(file.fileno(), nbytes, offset)
    while len(data) < nbytes:
        more = os.pread(file.fileno(), nbytes - len(data), offset + len(data))
        if not more:
            raise ended_early(Path(os.fsdecode(file.name)), nbytes - len(data))
        data += more
    return data


def write_all(target: int, values: Array, at: int) -> None:
    data = values.view(np.uint8).data
    while data:
        done = os.pwrite(target, data, at)
        data, at = data[done:], at + done
