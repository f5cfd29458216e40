"""Opens files to read; every fault becomes a CheckpointError that names the file."""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from ..schemas.errors import CheckpointError, UsageError

# Addresses of the Hub's website, whose second slash pathlib drops, and names of repositories there.
ADDRESS = re.compile(
    r"https?:/{1,2}(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)(?:/(?:resolve|blob|tree)/([^/?]+)/?([^?]*))?.*"
)
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


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


def require_exists(path: Path) -> None:
    """Raise UsageError when nothing is at `path`; the message names the source on the Hub that may be meant."""
    if path.exists():
        return
    text = path.as_posix()
    if address := ADDRESS.fullmatch(text):
        repo, revision, file = address.groups()
        at, below = f"@{revision}" if revision not in (None, "main") else "", f"/{file}" if file else ""
        raise UsageError(f"{text}: a web address; give hf://{repo}{at}{below}")
    if text.startswith(("http:/", "https:/")):
        raise UsageError(f"{text}: web addresses are not read; download the file, and give its path")
    meant = f", or hf://{text} if it is on the Hub" if REPOSITORY.fullmatch(text) else ""
    raise UsageError(f"{path}: no such file or folder; check the path{meant}")
