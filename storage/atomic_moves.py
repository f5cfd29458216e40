"""Moves finished files into a folder that has other files, all of them or none.

A journal on disk lists the moves beforehand. A process that fails undoes its moves. If a process is killed, the next
run finds the journal and undoes them. Replaced files stay in the scratch folder until the journal is gone.
"""

import ctypes
import errno
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from ..schemas.errors import ConversionError
from ..schemas.json_text import load_object

AT_FDCWD = -100  # the constants of Linux's renameat2(2)
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)

JOURNAL = "journal"
REPLACED = "replaced"  # the old files, or the old folder, until the new ones are in place


@dataclass(frozen=True)
class _Moves:
    """The content of a journal, in paths below the output.

    `files` to move have the size and time of change by which they are recognised. `gone` are old files that make room,
    `folders` are new folders."""

    files: dict[str, tuple[int, int]]
    gone: tuple[str, ...]
    folders: tuple[str, ...]


def merge(staged: Path, place: Path, gone: Sequence[str]) -> None:
    """Move the files `gone` out of the folder `place`, then all files below `staged` to the same paths below `place`.

    Raises OSError when that fails; nothing has changed then. A file that appears meanwhile is never replaced."""
    scratch = staged.parent
    entries = sorted(path for path in staged.rglob("*"))
    folders = [path.relative_to(staged) for path in entries if path.is_dir() and not path.is_symlink()]
    files = [path.relative_to(staged) for path in entries if not path.is_dir() or path.is_symlink()]
    moves = _Moves(
        {path.as_posix(): _known_by(staged / path) for path in files},
        tuple(gone),
        tuple(path.as_posix() for path in folders if not (place / path).exists()),
    )
    _write_journal(scratch, moves)
    try:
        for folder in moves.folders:
            (place / folder).mkdir()
        for name in moves.gone:
            _move(place / name, scratch / REPLACED / name)
        for name in moves.files:
            rename_new(staged / name, place / name)
        for path in {place, *((place / name).parent for name in (*moves.files, *moves.gone))}:
            flush(path)
    except BaseException:
        undo(scratch, staged, place)
        raise


def finish(scratch: Path) -> None:
    """Remove the journal: the moves are final."""
    (scratch / JOURNAL).unlink(missing_ok=True)
    flush(scratch)


def undo(scratch: Path, staged: Path, place: Path) -> None:
    """Move back every file that the journal in `scratch` lists. A journal that cascadekit did not write has no effect.

    Raises ConversionError when another file is there by now."""
    moves = _read_journal(scratch)
    if moves is None or staged.is_symlink() or (scratch / REPLACED).is_symlink():
        return
    for name, known_by in moves.files.items():
        _take_back(place / name, staged / name, known_by, scratch)
    for name in moves.gone:
        kept = scratch / REPLACED / name
        if not os.path.lexists(kept) or not _is_below(kept.parent, scratch):
            continue
        if os.path.lexists(place / name):
            raise _changed(place / name, scratch)
        _move(kept, place / name)
    for name in reversed(moves.folders):
        if (place / name).is_dir() and not any((place / name).iterdir()):
            (place / name).rmdir()
    finish(scratch)


def _take_back(moved: Path, home: Path, known_by: tuple[int, int], scratch: Path) -> None:
    if os.path.lexists(home) or not os.path.lexists(moved):
        return
    if _known_by(moved) != known_by:
        raise _changed(moved, scratch)
    _move(moved, home)


def _changed(path: Path, scratch: Path) -> ConversionError:
    return ConversionError(
        f"{path}: was changed after a run was killed while it replaced files here; the old files are in "
        f"{scratch / REPLACED}; put them where you want them, then remove {scratch}"
    )


def _write_journal(scratch: Path, moves: _Moves) -> None:
    unfinished = scratch / f"{JOURNAL}.new"
    with unfinished.open("w", encoding="utf-8") as file:
        json.dump(asdict(moves), file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(scratch / JOURNAL)
    flush(scratch)


def _read_journal(scratch: Path) -> _Moves | None:
    """Return the journal; None when there is none, or one with paths that lead out of the folder."""
    path = scratch / JOURNAL
    try:
        if path.is_symlink():
            return None
        content = load_object(path.read_text(encoding="utf-8"))
        files = {str(name): (int(size), int(time)) for name, (size, time) in content["files"].items()}
        moves = _Moves(files, tuple(map(str, content["gone"])), tuple(map(str, content["folders"])))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return moves if all(map(_stays_inside, (*moves.files, *moves.gone, *moves.folders))) else None


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _is_below(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _known_by(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_size, status.st_mtime_ns


def _move(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    rename_new(path, to)


def rename_new(path: Path, to: Path) -> None:
    """Rename, but raise FileExistsError instead of replacing anything."""
    if _rename(path, to, RENAME_NOREPLACE):
        return
    if os.path.lexists(to):  # a file system that cannot check and rename in one
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(to))
    path.rename(to)


def exchange(path: Path, other: Path) -> None:
    """Let two folders change places, in one step where the file system can."""
    if _rename(path, other, RENAME_EXCHANGE):
        return
    aside = path.with_name(REPLACED)
    other.rename(aside)
    try:
        path.rename(other)
    except BaseException:
        aside.rename(other)
        raise


def _rename(path: Path, to: Path, how: int) -> bool:
    """Return True when it is done, False when the system cannot rename so. Raises OSError when it failed."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(AT_FDCWD, os.fsencode(path), AT_FDCWD, os.fsencode(to), how) == 0:
        return True
    number = ctypes.get_errno()
    if number in NOT_SUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(path), None, str(to))


def flush_all(path: Path) -> None:
    """fsync a file, or every file and folder below a folder, but no hard link to a file that existed before."""
    for found in (path, *path.rglob("*")):  # nothing is below a file
        if found.is_dir() or found.stat().st_nlink == 1:
            flush(found)


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
