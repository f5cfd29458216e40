"""Casts and transposes ranges of files into another file, block by block in worker threads."""

import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from io import FileIO
from pathlib import Path

import numpy as np

from ..schemas.errors import ConversionError
from ..schemas.tensors import Shape
from .cast import Array, cast_block, cast_counted
from .copy_ranges import ended_early
from .safetensors_header import DTYPE_SIZES, Progress, TensorRange
from .tensor_plans import Piece

CAST_BLOCK = 1 << 22  # bytes of input a thread casts at a time; memory of larger blocks is paged in anew each time
CAST_THREADS = 2

Done = tuple[int, int, int]  # bytes written, values that became infinite, values that were not finite before
Task = Callable[[], Done]


@dataclass(frozen=True)
class Counts:
    """By tensor, how many finite values became infinite, and how many were NaN or infinite before they were cast."""

    overflows: Counter[str] = field(default_factory=Counter)
    not_finite: Counter[str] = field(default_factory=Counter)

    def notes(self, file: str) -> tuple[str, ...]:
        """What a user should know of values that are no numbers, or are none any more, in the file of that name."""
        kinds = {
            "became infinite in the new dtype": self.overflows,
            "were NaN or infinite before the cast, and still are": self.not_finite,
        }
        return tuple(
            f"{file}: {found.total()} values in {len(found)} tensors {what}, most in "
            + ", ".join(f"{name} ({count})" for name, count in found.most_common(5))
            for what, found in kinds.items()
            if found
        )


def compute(pieces: Iterable[Piece], target: int, progress: Progress | None) -> Counts:
    """Cast and transpose what is not copied. Raises ConversionError for a scale that is no number."""
    counts = Counts()
    tasks = ((piece.name, task) for piece in pieces if piece.computed for task in _tasks(piece, target))
    # Whatever ends this block waits for the workers: none may write once the file is closed.
    with ThreadPoolExecutor(CAST_THREADS) as pool:
        for name, (nbytes, overflow, not_finite) in _run(pool, tasks):
            if overflow:
                counts.overflows[name] += overflow
            if not_finite:
                counts.not_finite[name] += not_finite
            if progress:
                progress(nbytes)
    return counts


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
    scale = read_scale(part)
    if part.transposed:
        for rows, columns in _tiles(part.shape, limit):
            yield partial(_transpose_tile, piece, rows, columns, scale, target)
    else:
        for span in _cuts(part.nbytes // DTYPE_SIZES[part.dtype], limit):
            yield partial(_cast_span, piece, span, scale, target)


def read_scale(part: TensorRange) -> np.float32 | None:
    """The number that all values of a tensor are to be multiplied by. Raises ConversionError when it is not finite."""
    if part.scale is None:
        return None
    with part.scale.path.open("rb", buffering=0) as file:
        data = read_exactly(file, part.scale.offset, part.scale.nbytes)
    scale = np.float32(cast_block(data, part.scale.dtype, "F32")[0][0])
    if not np.isfinite(scale):
        raise ConversionError(
            f"{part.scale.path}: the fp8 scale at byte {part.scale.offset} is {scale}, no finite number; "
            "get the checkpoint in another dtype"
        )
    return scale


def _cuts(size: int, step: int) -> Iterator[range]:
    return (range(start, min(start + step, size)) for start in range(0, size, step))


def _tiles(shape: Shape, limit: int) -> Iterator[tuple[range, range]]:
    """Rows and columns of tiles of at most `limit` values: whole rows of the output or of the source where that
    leaves the other side long, squares otherwise, so that neither is read or written in crumbs."""
    rows, columns = shape
    height = max(1, min(rows, max(math.isqrt(limit), limit // max(1, columns))))
    width = max(1, limit // height)
    return ((down, across) for down in _cuts(rows, height) for across in _cuts(columns, width))


def _cast_span(piece: Piece, span: range, scale: np.float32 | None, target: int) -> Done:
    part, size = piece.part, DTYPE_SIZES[piece.part.dtype]
    with part.path.open("rb", buffering=0) as file:
        data = read_exactly(file, part.offset + span.start * size, len(span) * size)
    values, overflow, not_finite = cast_counted(data, part.dtype, piece.dtype, scale)
    write_all(target, values, piece.at + span.start * values.itemsize)
    return values.nbytes, overflow, not_finite


def _transpose_tile(piece: Piece, rows: range, columns: range, scale: np.float32 | None, target: int) -> Done:
    """Write the given rows and columns of the tensor; in the source they are columns and rows."""
    part, size = piece.part, DTYPE_SIZES[piece.part.dtype]
    line, width = part.shape[0] * size, part.shape[1] * DTYPE_SIZES[piece.dtype]
    with part.path.open("rb", buffering=0) as file:
        start = part.offset + columns.start * line + rows.start * size
        data = read_lines(file, start, line, len(columns), len(rows) * size)
    moved = part.dtype == piece.dtype and scale is None
    tile, overflow, not_finite = (data, 0, 0) if moved else cast_counted(data, part.dtype, piece.dtype, scale)
    bits = np.frombuffer(tile, f"<u{DTYPE_SIZES[piece.dtype]}").reshape(len(columns), len(rows))
    at = piece.at + rows.start * width + columns.start * bits.itemsize
    write_lines(target, np.ascontiguousarray(bits.T), at, width)
    return bits.nbytes, overflow, not_finite


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
