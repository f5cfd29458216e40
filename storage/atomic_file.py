"""Files that appear whole or not at all, and the hidden names they have until then.

A file in the making is called `.NAME.RANDOM.partial`, and the process that writes it holds its lock. The lock ends
with the process, so an unlocked file is a leftover of a killed one.
"""

import errno
import fcntl
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .locks import is_at

NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # on a file system without hard links
LONGEST = 255  # bytes of a file's name, on all common file systems
TAIL = ".partial"
LEFTOVER = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}" + re.escape(TAIL), re.DOTALL)


def room_advice(error: OSError) -> str:
    """What to do about a full disk, for the end of a message; "" for another error."""
    return "; make room, or choose another disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""


@contextmanager
def whole_file(path: Path, mode: int | None = None) -> Iterator[IO[bytes]]:
    """A file to write. It replaces `path` when the context ends, and is on disk then; after an exception it is gone.

    `mode` is its permissions, None for those of any new file. Leftovers of killed processes are removed first. Raises
    OSError when the file cannot be written."""
    remove_leftovers(path.parent, {_shortened(path.name, _RANDOM)}.__contains__)
    with unplaced_file(path, mode) as (file, scratch):
        yield file
        finish(file)
        scratch.replace(path)


@contextmanager
def unplaced_file(path: Path, mode: int | None = None) -> Iterator[tuple[IO[bytes], Path]]:
    """A file to write, and its hidden name beside `path`. The hidden name is gone when the context ends; the caller
    gives the file its name before that."""
    file = _locked_file(path)
    scratch = Path(file.name)
    try:
        with file:
            scratch.chmod(_usual() if mode is None else mode)
            yield file, scratch
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)


def claim(scratch: Path, path: Path) -> bool:
    """Give a finished file the name `path` unless that exists; of several processes one succeeds."""
    try:
        os.link(scratch, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        scratch.replace(path)
    return True


def finish(file: IO[bytes]) -> None:
    """Bring everything that was written to disk."""
    file.flush()
    os.fsync(file.fileno())


def remove_leftovers(folder: Path, chosen: Callable[[str], bool]) -> None:
    """Remove leftovers of killed processes in `folder`, for files whose names are `chosen`.

    A file that a live process writes stays."""
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            match = LEFTOVER.fullmatch(entry.name)
            if match and chosen(match["name"]) and entry.is_file(follow_symlinks=False):
                _remove_unless_locked(Path(entry.path))


def hidden_name(name: str) -> str:
    """The hidden name that something has until it becomes `name`, cut to the longest name allowed."""
    return f".{_shortened(name, len(TAIL))}{TAIL}"


_RANDOM = len(".12345678" + TAIL)


def _shortened(name: str, more: int) -> str:
    """Return `name`, cut to leave room for a dot before it and `more` bytes behind it."""
    return os.fsdecode(os.fsencode(name)[: LONGEST - 1 - more])


def _locked_file(path: Path) -> IO[bytes]:
    """Make a hidden file beside `path` and lock it. It is made again if a cleaner removed it before it was locked."""
    while True:
        file = tempfile.NamedTemporaryFile(  # noqa: SIM115
            "wb", dir=path.parent, prefix=f".{_shortened(path.name, _RANDOM)}.", suffix=TAIL, delete=False
        )
        with suppress(OSError):  # on a file system without locks no cleaner gets one either
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        if is_at(file.fileno(), Path(file.name)):
            return file
        file.close()


def _remove_unless_locked(path: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_at(descriptor, path):
                path.unlink()
        finally:
            os.close(descriptor)


def _usual() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask
