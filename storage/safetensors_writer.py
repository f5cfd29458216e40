"""Writes safetensors files from ranges of other files: copied in the kernel, cast or transposed block by block."""

import errno
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from ..schemas.errors import ConversionError
from .cast import FLOATS, castable
from .cast_ranges import Counts, compute
from .copy_ranges import copy_range, merged
from .safetensors_header import Progress, encode_header
from .tensor_plans import TensorPlan, pieces

FLUSH_PAUSE = 0.05  # seconds between two flushes


def write_file(
    path: Path,
    tensors: Mapping[str, TensorPlan],
    metadata: Mapping[str, str],
    progress: Progress | None = None,
    *,
    allow_overflow: bool = False,
    overflow_advice: str = "",
) -> Counts:
    """Write a safetensors file from ranges of other files, in the order of `tensors`.

    Returns, for each tensor with any, how many finite values became infinite in its dtype, and how many of those that
    were cast are NaN or infinite in the source. The header is padded to 8 bytes. The file is on disk (fsync) when this
    returns; whoever calls renames it. Memory is a few blocks per thread (some 100 MB in all), however large the
    tensors. `progress` counts bytes of the output's tensors.

    Raises ConversionError when the disk is full, a source cannot be read, a dtype cannot be cast, or, without
    `allow_overflow`, when values became infinite (`overflow_advice` is what to do then, where that is not an option of
    `convert`); the file is then to be thrown away."""
    _check_castable(tensors)
    header = encode_header(tensors, metadata)
    total = len(header) + sum(plan.nbytes for plan in tensors.values())
    try:
        with path.open("wb") as out:
            reserve(out.fileno(), total)
            out.truncate(total)  # so that zeros need not be written, where nothing could be reserved
            out.write(header)
            out.flush()
            with flushing(out.fileno()):
                for run in merged(pieces(tensors, len(header))):
                    copy_range(*run, out.fileno(), progress)
                counts = compute(pieces(tensors, len(header)), out.fileno(), progress)
            os.fsync(out.fileno())
    except OSError as error:
        raise ConversionError(what_failed(path, total, error)) from error
    if counts.overflows and not allow_overflow:
        raise ConversionError(_overflow_message(path, tensors, counts.overflows, overflow_advice))
    return counts


@contextmanager
def flushing(target: int) -> Iterator[None]:
    """Inside, a thread sends to the disk what has been written so far, again and again.

    Left alone, the kernel begins only when gigabytes have gathered, and the disk idles until then. Raises the
    OSError of a flush when the block ends: the kernel reports it once, an fsync afterwards would know nothing."""
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
    for name, plan in tensors.items():
        for part in plan.ranges:
            if part.scale is not None and plan.dtype not in FLOATS:
                raise ConversionError(
                    f"{part.path}: {name}: scaled fp8, a weight and the scale it is to be multiplied by, is read but "
                    "not written; choose a dtype, such as --dtype bf16"
                )
            if part.dtype != plan.dtype and not castable(part.dtype, plan.dtype):
                raise ConversionError(
                    f"{part.path}: {name}: {part.dtype} cannot become {plan.dtype}; only {', '.join(FLOATS)} are cast"
                )


def what_failed(path: Path, total: int, error: OSError) -> str:
    """One line on an error while `total` bytes were to be written to `path`."""
    if error.filename not in (None, str(path)):
        return f"{error.filename}: cannot be read: {error.strerror}"
    return f"{path}: cannot be written ({total} bytes needed): {error.strerror}"


def _overflow_message(path: Path, tensors: Mapping[str, TensorPlan], overflows: Counter[str], advice: str) -> str:
    worst = [f"{name} ({count} in {tensors[name].dtype})" for name, count in overflows.most_common(5)]
    more = f" and {len(overflows) - len(worst)} more tensors" if len(overflows) > len(worst) else ""
    dtypes = {tensors[name].dtype for name in overflows}
    wider = "--dtype bf16, which reaches as far as float32" if dtypes == {"F16"} else "a wider dtype"
    advice = advice or f"try {wider}, or keep the infinities with --allow-overflow"
    return f"{path.name}: {overflows.total()} finite values become infinite: {', '.join(worst)}{more}; {advice}"


def reserve(target: int, total: int) -> None:
    """Take `total` bytes of disk, so that a full one is an error before the first byte is copied."""
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
