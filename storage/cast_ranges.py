"""Casts and transposes ranges of files into another file, block by block in worker threads."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from ..schemas.block_types import QUANTISED, nbytes_of
from ..schemas.callbacks import Progress
from ..schemas.dtypes import DTYPE_SIZES
from ..schemas.errors import ConversionError
from ..schemas.tensors import Shape
from .cast import Cast, cast_counted
from .file_ranges import Wrote, read_exactly, read_lines, write_all, write_lines
from .read_scale import Factors, cast_scaled, read_scale
from .safetensors_plan import Counts, PlacedRange
from .threads import CAST_THREADS, run_in_order

CAST_BLOCK = 1 << 22  # bytes that a thread casts at a time; memory of larger blocks is paged in anew each time


class Done(NamedTuple):
    """The result of a task: bytes written, values that became infinite, values that were not finite before."""

    nbytes: int
    overflow: int
    not_finite: int


Task = Callable[[], Done]


def cast_placed(ranges: Iterable[PlacedRange], target: int, progress: Progress | None, wrote: Wrote) -> Counts:
    """Cast, scale and transpose into the open file `target` those `ranges` that are not copied as they are.

    `wrote` is not called for transposed ranges, which are not written in their order.

    Raises ConversionError for an fp8 scale that is not finite, OSError if a source ends too early."""
    counts = Counts()
    tasks = ((placed, task) for placed in ranges if placed.computed for task in _tasks(placed, target))
    done: Counter[int] = Counter()  # bytes of each range, by the byte at which the range begins
    # Whatever ends this block waits for the workers: none may write once the file is closed.
    with ThreadPoolExecutor(CAST_THREADS) as pool:
        for placed, (nbytes, overflow, not_finite) in run_in_order(pool, tasks):
            if overflow:
                counts.overflows[placed.name] += overflow
            if not_finite:
                counts.not_finite[placed.name] += not_finite
            if not placed.range.transposed:
                wrote(placed.at + done[placed.at], nbytes)
                done[placed.at] += nbytes
            if progress:
                progress(nbytes)
    return counts


def _tasks(placed: PlacedRange, target: int) -> Iterator[Task]:
    """Yield tasks for blocks of a range: at most CAST_BLOCK bytes of input or of float32, at least one value."""
    source = placed.range
    width = 4 if {source.dtype, placed.dtype} & {*QUANTISED} else DTYPE_SIZES[source.dtype]
    limit = max(1, CAST_BLOCK // width)
    work = _Work(placed, read_scale(source), target)
    if source.transposed:
        for rows, columns in _tiles(source.shape, limit):
            yield partial(_transpose_tile, work, rows, columns)
    else:
        for span in _cuts(math.prod(source.shape), limit):
            yield partial(_cast_span, work, span)


def _cuts(size: int, step: int) -> Iterator[range]:
    return (range(start, min(start + step, size)) for start in range(0, size, step))


def _tiles(shape: Shape, limit: int) -> Iterator[tuple[range, range]]:
    """Yield rows and columns of tiles of at most `limit` values.

    Tiles are whole rows of the output or of the source where the other side stays long, else squares. Thus neither
    file is read or written in very short lines."""
    rows, columns = shape
    height = max(1, min(rows, max(math.isqrt(limit), limit // max(1, columns))))
    width = max(1, limit // height)
    return ((down, across) for down in _cuts(rows, height) for across in _cuts(columns, width))


@dataclass(frozen=True)
class _Work:
    """A range to compute, the scale of its values, and the descriptor of the target file."""

    placed: PlacedRange
    scale: Factors | None
    target: int


def _cast_span(work: _Work, span: range) -> Done:
    """Cast the values whose numbers are in `span`, which begins and ends with a block."""
    source, dtype = work.placed.range, work.placed.dtype
    start, nbytes = nbytes_of(source.dtype, span.start), nbytes_of(source.dtype, len(span))
    with source.path.open("rb", buffering=0) as file:
        data = read_exactly(file, source.offset + start, nbytes)
    try:
        values, overflow, not_finite = cast_scaled(data, source.dtype, dtype, work.scale, span)
    except ConversionError as error:
        raise ConversionError(f"{source.path}: {work.placed.name} {error}") from error
    write_all(work.target, values, work.placed.at + nbytes_of(dtype, span.start))
    return Done(values.nbytes, overflow, not_finite)


def _transpose_tile(work: _Work, rows: range, columns: range) -> Done:
    """Write the given rows and columns of the tensor; in the source they are columns and rows."""
    source, dtype = work.placed.range, work.placed.dtype
    size, width = DTYPE_SIZES[source.dtype], source.shape[1] * DTYPE_SIZES[dtype]
    line = source.shape[0] * size
    with source.path.open("rb", buffering=0) as file:
        start = source.offset + columns.start * line + rows.start * size
        data = read_lines(file, start, line, len(columns), len(rows) * size)
    if source.dtype == dtype and work.scale is None:  # the values are moved without a change
        cast = Cast(np.frombuffer(data, np.uint8), 0, 0)
    else:
        cast = cast_counted(data, source.dtype, dtype, None if work.scale is None else work.scale.of(range(0)))
    bits = np.frombuffer(cast.values, f"<u{DTYPE_SIZES[dtype]}").reshape(len(columns), len(rows))
    at = work.placed.at + rows.start * width + columns.start * bits.itemsize
    write_lines(work.target, np.ascontiguousarray(bits.T), at, width)
    return Done(bits.nbytes, cast.overflow, cast.not_finite)
