"""Outputs appear whole or not at all: written beside their place, flushed to disk, then renamed into it."""

import ctypes
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..schemas.errors import ConversionError, UsageError

AT_FDCWD = -100  # the constants of Linux's renameat2(2)
RENAME_EXCHANGE = 2

REPLACED = "replaced"  # the old output, for the moment between two renames
NOTE = "fingerprint"  # in the scratch folder: says which work its content belongs to


@contextmanager
def staged_output(target: Path, *, force: bool = False, fingerprint: str = "") -> Iterator[Path]:
    """A path to write a file or folder at; it becomes `target` when the block ends well.

    When the block raises, nothing is left behind and an old `target` is as it was. A killed process leaves a folder
    `.NAME.partial` beside the target, which the next run throws away, or finds again at the yielded path if both
    had the same `fingerprint`: files in it are then what an earlier run of the same work completed.
    Raises UsageError when `target` exists without `force` or another process is writing it, ConversionError when
    its folder cannot be written."""
    if target.exists() and not force:
        raise UsageError(f"{target}: exists already; give another output or --force to replace it")
    scratch = target.parent / f".{target.name}.partial"
    with _locked(scratch, target):
        staged = scratch / target.name
        try:
            _restore(scratch, target, force)
            _keep_only(scratch, fingerprint)
            yield staged
            _flush(staged)
            # From here on the scratch folder may hold the old output, which no later run must take for its own work.
            (scratch / NOTE).unlink(missing_ok=True)
            _flush_one(scratch)
            _put_in_place(staged, target)
        except OSError as error:
            where = error.filename or target
            raise ConversionError(f"{where}: cannot be written: {error.strerror or error}") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _locked(scratch: Path, target: Path) -> Iterator[None]:
    """The scratch folder, held by this process alone. The lock goes with the process, however that ends."""
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(scratch, os.O_RDONLY)
    except OSError as error:
        raise ConversionError(
            f"{target}: cannot be written: {error.strerror} ({error.filename}); choose another output"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UsageError(
            f"{target}: another process is writing it; wait for that one or choose another output"
        ) from error
    else:
        yield
    finally:
        os.close(descriptor)


def _restore(scratch: Path, target: Path, force: bool) -> None:
    """Put back the old output if a run was killed between moving it away and putting the new one in its place."""
    replaced = scratch / REPLACED
    if replaced.exists() and not target.exists():
        replaced.rename(target)
        if not force:
            raise UsageError(f"{target}: exists already; give another output or --force to replace it")


def _keep_only(scratch: Path, fingerprint: str) -> None:
    """Empty the scratch folder unless a run with the same fingerprint left it."""
    note = scratch / NOTE
    known = note.is_file() and not note.is_symlink() and note.read_bytes() == fingerprint.encode()
    if not fingerprint or not known or any(path.is_symlink() for path in scratch.iterdir()):
        for left in scratch.iterdir():
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink()
    if fingerprint:
        note.write_text(fingerprint, encoding="utf-8")


def _flush(path: Path) -> None:
    """fsync a file, or every file and folder below a folder; not what is a link to a file that was there before."""
    for found in (path, *path.rglob("*")):
        if found.is_dir() or found.stat().st_nlink == 1:
            _flush_one(found)


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(staged: Path, target: Path) -> None:
    """Rename; a folder that is there already trades places with the new one, so that at any moment one is there."""
    if not target.is_dir():
        staged.replace(target)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(staged), os.fsencode(target)
    if libc.renameat2(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) != 0:
        target.rename(staged.with_name(REPLACED))  # a file system without exchange
        staged.replace(target)


@contextmanager
def scratch_folder(scratch: Path, target: Path) -> Iterator[Path]:
    """An empty folder at `scratch`, held by this process alone and removed at the end, for what is to go to `target`
    piece by piece. What a killed process left in it is thrown away. Raises as `staged_output` does."""
    with _locked(scratch, target):
        try:
            _keep_only(scratch, "")
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
