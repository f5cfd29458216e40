"""Recognises bundles and locks them, without reading the manifest."""

import os
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from ..schemas.errors import UsageError
from ..schemas.folders import MANIFEST_NAME
from .locks import locked

SHOWN = 3  # bundles in a folder that a message names


def is_bundle(path: Path) -> bool:
    """True when the folder at `path` has a bundle's manifest; the manifest is not read."""
    return (path / MANIFEST_NAME).is_file()


def require_manifest(root: Path) -> None:
    """Raise UsageError when there is no bundle at `root`."""
    if not is_bundle(root):
        raise UsageError(f"{root}: not a bundle, {_instead(root)}")


def _instead(root: Path) -> str:
    """What is at `root` in place of a bundle, and what to do."""
    if not os.path.exists(root):
        return "nothing is there; check the path, or make one with `cascadekit export`"
    if above := next(filter(is_bundle, root.parents), None):
        return f"but a part of one; give {above}"
    if not root.is_dir():
        return "it is a file; give the folder of one, or make one with `cascadekit export`"
    with suppress(OSError):
        if below := sorted(str(child) for child in root.iterdir() if is_bundle(child)):
            return f"it has no {MANIFEST_NAME}; give {' or '.join(below[:SHOWN])}"
    return f"it has no {MANIFEST_NAME}; make one with `cascadekit export`"


def locked_bundle(root: Path) -> AbstractContextManager[None]:
    """Wait for the lock of the bundle at `root` and hold it. Every process that changes the manifest takes this lock.

    A process that waits says so after a second, see `locked`. Nothing is locked on a file system without locks for
    folders, such as some network drives. Raises UsageError when there is no bundle."""
    return locked(Path(os.path.realpath(root)), lambda: require_manifest(root), wait=True, output=root)
