"""Outputs appear whole or not at all: written beside their place, flushed to disk, then renamed into it."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..schemas.errors import ConversionError, UsageError


@contextmanager
def staged_output(target: Path, *, force: bool = False) -> Iterator[Path]:
    """A path to write a file or folder at (it does not exist yet); it becomes `target` when the block ends well.

    When the block raises, nothing is left behind and an old `target` is as it was.
    Raises UsageError when `target` exists without `force`, ConversionError when its folder cannot be written."""
    if target.exists() and not force:
        raise UsageError(f"{target}: exists already; give another output or --force to replace it")
    scratch = _scratch_folder(target)
    try:
        staged = scratch / target.name
        try:
            yield staged
            _flush(staged)
            _put_in_place(staged, target, scratch)
        except OSError as error:
            where = error.filename or target
            raise ConversionError(f"{where}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _scratch_folder(target: Path) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except OSError as error:
        raise ConversionError(
            f"{target}: cannot be written: {error.strerror} ({error.filename}); choose another output"
        ) from error


def _flush(path: Path) -> None:
    """fsync a file, or every file and folder below a folder."""
    for found in (path, *path.rglob("*")):
        descriptor = os.open(found, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _put_in_place(staged: Path, target: Path, scratch: Path) -> None:
    # mkdtemp makes private folders; what comes out should have the rights of anything else written here.
    umask = os.umask(0)
    os.umask(umask)
    staged.chmod((0o777 if staged.is_dir() else 0o666) & ~umask)
    if target.is_dir():  # a folder cannot be renamed over another; the old one goes when all is well
        target.rename(scratch / f"{target.name}.replaced")
    staged.replace(target)
