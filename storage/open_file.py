"""Opens files to read; every fault becomes a CheckpointError that names the file."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from ..schemas.errors import CheckpointError


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """Open the file at `path` to read. Raises CheckpointError as `require_regular` does, and for every OSError in the
    block."""
    require_regular(path)
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def require_regular(path: Path) -> os.stat_result:
    """Return the status of the file at `path`, or of the file that a link there leads to.

    Raises CheckpointError for anything but a regular file: opening a pipe waits for ever, a device may have no end."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: cannot be read: not a regular file")
    return status
