"""Locks of files and folders between processes; a lock ends with the process that holds it."""

import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from ..schemas.callbacks import Say

QUIET_SECONDS = 1.0  # of waiting, after which the user is told
RETRY_SECONDS = 0.05


def _write_to_stderr(text: str) -> None:
    if sys.stderr is not None:
        print(text, file=sys.stderr, flush=True)


# Called with the line that says who is waited for. The command line sets its own.
say_waiting: ContextVar[Say] = ContextVar("say_waiting", default=_write_to_stderr)


@contextmanager
def locked(
    path: Path, prepare: Callable[[], object], *, wait: bool = False, output: Path | None = None
) -> Iterator[None]:
    """Hold the lock of the file or folder at `path`; `path` itself must not be a link.

    `prepare` makes it or checks that it is there. It is called again when another process removed or replaced `path`
    before it was locked. With `wait`, file systems without locks count as locked, and `say_waiting` is called when a
    second has passed; its line names `output`, which `path` protects (None: `path` itself).

    Raises BlockingIOError when another process has the lock and `wait` is off, OSError when it cannot be locked."""
    while (descriptor := _lock(path, prepare, output or path, wait=wait)) is None:
        continue
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(path: Path, prepare: Callable[[], object], output: Path, *, wait: bool) -> int | None:
    prepare()
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        if wait:
            with suppress(OSError):
                _wait(descriptor, output)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_at(descriptor, path):
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _wait(descriptor: int, output: Path) -> None:
    """Take the lock when it becomes free; say so once if that takes longer than a second."""
    quiet_until = time.monotonic() + QUIET_SECONDS
    while time.monotonic() < quiet_until:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(RETRY_SECONDS)
        else:
            return
    holder = _holder(os.fstat(descriptor))
    say_waiting.get()(f"waiting for another cascadekit that writes to {output}{holder}")
    fcntl.flock(descriptor, fcntl.LOCK_EX)


def holder_of(path: Path) -> str:
    """The process that has the lock of `path`, as " (pid 12)" for a message; "" when it is not known."""
    try:
        return _holder(path.stat())
    except OSError:
        return ""


def _holder(status: os.stat_result) -> str:
    """The kernel lists locks with process, device and file: `1: FLOCK ADVISORY WRITE 12 fe:00:7 0 EOF`."""
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return ""
    found = (line.split() for line in lines)
    pids = [words[4] for words in found if len(words) > 5 and words[1:6:4] == ["FLOCK", place]]
    return f" (pid {pids[0]})" if pids and pids[0].isdecimal() and pids[0] != "0" else ""


def is_at(descriptor: int, path: Path) -> bool:
    """True when `path` names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False
