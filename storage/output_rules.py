"""Where outputs may lie and what they may replace: the one rule of every command that writes.

Files go into an existing folder beside what is there. `--force` replaces files of the same names, or a whole folder
that we made and that holds nothing else (`converters.ownership` tells). No output is, contains or lies inside a source.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..schemas.errors import UsageError

SHOWN = 3  # names in a message, of what may be thousands

Identity = tuple[int, int]


def locate(target: Path) -> Path:
    """The place that `target` names, without `..`. A link to a folder stands for the folder; a link to a file stays
    the link, which is what an output replaces.

    Raises UsageError for a link that leads nowhere."""
    if target.is_dir() or target.name == "..":
        return Path(os.path.realpath(target))
    if target.is_symlink() and not target.exists():
        raise UsageError(f"{target}: is a link that leads nowhere; remove it or give another output")
    return Path(os.path.realpath(target.parent)) / target.name


def require_apart(target: Path, sources: Iterable[str | Path]) -> None:
    """Raise UsageError when `target` is one of the `sources`, contains one or lies inside one; by the files
    themselves, whatever their names and links."""
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
                raise UsageError(f"{target}: lies inside the source {source}; give an output outside of it")
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
    """Raise UsageError when there is a folder where one file is to go, or a file and no `force`."""
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; give the name of a file to write")
    if os.path.lexists(path) and not force:
        raise UsageError(f"{path}: exists already; give another output or --force to replace it")


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _is_source(target: Path, source: str | Path) -> UsageError:
    return UsageError(f"{target}: is the source {source} itself, which not even --force replaces; give another output")


def _identity(path: Path) -> Identity | None:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino
