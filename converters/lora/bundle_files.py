"""Fills the folder of a changed bundle with the files of the old bundle, as links, clones or copies."""

import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from ...schemas.callbacks import Progress
from ...schemas.errors import ConversionError
from ...schemas.manifest import Placement
from ...storage.file_ranges import CopiedRange, copy_range
from ...storage.safetensors_writer import reserve, what_failed
from ..export.bundle_weights import clone


def link_others(root: Path, staged: Path, without: Collection[Path]) -> None:
    """Make the folder `staged` with links to every file of the bundle at `root` except the files `without`."""
    for source, target in _others(root, staged, without):
        link(source, target)


def share_others(root: Path, staged: Path, without: Collection[Path]) -> dict[Path, Placement]:
    """Make the folder `staged` with a clone of every file of the bundle at `root` except the files `without`.

    If the file system cannot clone, files are linked or copied. Returns how each file was placed."""
    return {target: _share(source, target) for source, target in _others(root, staged, without)}


def link(source: Path, target: Path) -> Placement:
    """Make a hard link, or a copy that keeps the time of the last change if the file system has no links."""
    try:
        os.link(source, target, follow_symlinks=False)
        return "link"
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
        return "copy"


def copy(source: Path, target: Path, progress: Progress | None) -> None:
    """Copy a file. A clone, where the file system makes one, takes no time and no space."""
    size = source.stat().st_size
    try:
        if clone(source, target):
            return
        with target.open("xb") as out:
            reserve(out.fileno(), size)
            copy_range(CopiedRange(source, 0, size, 0), out.fileno(), progress)
    except OSError as error:
        raise ConversionError(what_failed(target, size, error)) from error


def _others(root: Path, staged: Path, without: Collection[Path]) -> Iterator[tuple[Path, Path]]:
    """Make `staged` with the folders of the bundle. Yields each file that is not in `without`, and its new path."""
    staged.mkdir()
    for path in sorted(root.rglob("*")):
        target = staged / path.relative_to(root)
        if path.is_dir() and path.is_symlink():
            target.symlink_to(path.resolve())
        elif path.is_dir():
            target.mkdir()
        elif path.is_file() and path not in without:
            yield path, target


def _share(source: Path, target: Path) -> Placement:
    """Clone a file and its time of the last change; link or copy it where that fails. Symbolic links are followed."""
    source = source.resolve()
    if clone(source, target):
        shutil.copystat(source, target)
        return "reflink"
    return link(source, target)
