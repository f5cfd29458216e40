"""Remembers which packages of AOTInductor this user built on this machine.

A package is machine code that runs with the user's rights as soon as it is loaded. The SHA-256 in a bundle's manifest
shows that a package is whole, and not where it comes from: whoever made the bundle wrote both. A list of what
was built here is therefore kept outside of all bundles, in the user's cache folder.
"""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from ....schemas.errors import EngineError
from ....storage.user_cache import user_cache

FOLDER = "aotinductor"
NOT_BUILT_HERE = "was not built by you on this machine, and a package is code that would run"
MARK = ".built-here"  # a file of this suffix for each package, named by the SHA-256


def remember_built(sha256: str) -> None:
    """Record that this user built the package of this SHA-256. Raises OSError when the cache folder is not writable."""
    path = _mark(sha256)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.touch()


def is_built_here(sha256: str) -> bool:
    """True if this user built the package of this SHA-256 on this machine."""
    return _mark(sha256).is_file()


def _mark(sha256: str) -> Path:
    return user_cache(FOLDER) / f"{sha256}{MARK}"


@contextmanager
def private_copy(path: Path, sha256: str) -> Iterator[Path]:
    """A copy of the package at `path` in a folder that only this user can write, for as long as the context lasts.

    The copy is hashed, so that nobody can exchange the file between the check and the loading. Raises EngineError when
    it has another SHA-256, or was not built here."""
    with TemporaryDirectory(prefix="cascadekit-package-") as folder:
        copy = Path(folder) / "package.pt2"
        try:
            shutil.copyfile(path, copy)
            with copy.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise EngineError(f"{path}: cannot be read: {error.strerror}") from error
        if found != sha256:
            raise EngineError(f"{path}: it changed while it was loaded; build it again with `cascadekit build`")
        if not is_built_here(sha256):
            raise EngineError(f"{path}: {NOT_BUILT_HERE}")
        yield copy
