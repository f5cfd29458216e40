"""Locks of files and folders between processes; a lock ends with the process that holds it."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path


@contextmanager
def locked(path: Path, prepare: Callable[[], object], *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of the file or folder at `path`; `path` itself must not be a link.

    `prepare` makes it or checks that it is there. It is called again when another process removed or replaced `path`
    before it was locked. With `wait`, file systems without locks count as locked.

    Raises BlockingIOError when another process has the lock and `wait` is off, OSError when it cannot be locked."""
    while (descriptor := _lock(path, prepare, wait)) is None:
        continue
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(path: Path, prepare: Callable[[], object], wait: bool) -> int | None:
    prepare()
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        with suppress(OSError) if wait else nullcontext():
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if is_at(descriptor, path):
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def is_at(descriptor: int, path: Path) -> bool:
    """True when `path` names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False
