"""Decides the places of outputs and the files they may replace; every command that writes follows these rules.

- Files go into an existing folder beside the files that are there.
- ``force=True`` replaces files of the same names, or a whole folder that cascadekit made and that holds nothing else
  (see ``replaceable_folders``).
- No output is a source, contains one or is inside one.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from ..schemas.errors import UsageError

Identity = tuple[int, int]


def locate(target: Path) -> Path:
    """Return the path of `target` without `..` and links to folders. A link to a file stays: an output replaces it.

    Raises UsageError for a link that leads nowhere."""
    if target.is_dir() or target.name == "..":
        return Path(os.path.realpath(target))
    if target.is_symlink() and not target.exists():
        raise UsageError(f"{target}: is a link that leads nowhere; remove it or give another output")
    return Path(os.path.realpath(target.parent)) / target.name


def require_apart(target: Path, sources: Iterable[str | Path]) -> None:
    """Raise UsageError when `target` is one of the `sources`, contains one or is inside one.

    The files themselves are compared, whatever their names and links."""
    place = locate(target)
    here = _identity(place)
    above = {_identity(parent) for parent in place.parents}
    for source in map(Path, sources):
        for path in {Path(os.path.realpath(source)), Path(os.path.realpath(source.parent)) / source.name}:
            found = _identity(path)
            if found is None:
                continue
            if found == here:
                raise _is_source(target, source)
            if found in above:
                raise UsageError(f"{target}: is inside the source {source}; give an output outside of it")
            if here is not None and here in map(_identity, path.parents):
                raise UsageError(f"{target}: contains the source {source}; give another output, a folder of its own")


def require_none_is(targets: Iterable[Path], sources: Iterable[str | Path]) -> None:
    """Raise UsageError when one of many `targets` is one of many `sources`."""
    known = {_identity(Path(source)): source for source in sources}
    known.pop(None, None)
    for target in targets:
        if (found := _identity(target)) in known:
            raise _is_source(target, known[found])


def require_free(path: Path, *, force: bool) -> None:
    """Raise UsageError when `path` is a folder, or an existing file without `force`."""
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; give the name of a file to write")
    if os.path.lexists(path) and not force:
        raise UsageError(f"{path}: exists already; give another output, or force=True to replace it")


def require_writable(output: Path) -> None:
    """Raise UsageError when neither `output` nor a folder for it can be made: found now, not after the work."""
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    if there != output and not there.is_dir():
        raise UsageError(f"{output}: {there} is no folder; choose another output")
    folder = there if there.is_dir() else there.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{output}: {folder} cannot be written; choose another output")


def _is_source(target: Path, source: str | Path) -> UsageError:
    return UsageError(
        f"{target}: is the source {source} itself, which not even force=True replaces; give another output"
    )


def _identity(path: Path) -> Identity | None:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino
