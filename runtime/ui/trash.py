"""Deleted images: they are moved into a folder beside the others, and come back until the server ends."""

import secrets
from collections import OrderedDict
from pathlib import Path
from threading import Lock

from ...schemas.errors import UsageError
from ...storage.atomic_file import claim
from .gallery import Gallery

FOLDER = "trash"  # beside the images
REMEMBERED = 100  # deletions that can be undone


class Trash:
    """Moves images of a gallery into its folder `trash`, and back. Files without settings of cascadekit stay."""

    def __init__(self, gallery: Gallery) -> None:
        self._gallery = gallery
        self._folder = gallery.folder / FOLDER
        self._lock = Lock()  # held while `_moved` changes; every request has its own thread
        self._moved: OrderedDict[str, tuple[str, Path]] = OrderedDict()  # by token: the old name, and the new place

    def delete(self, name: str) -> str | None:
        """Move the image of that name into the trash and return a token for `restore`; None without such an image.

        Raises UsageError when it cannot be moved."""
        path = self._gallery.file(name)
        try:
            if path is None or self._gallery.describe(path) is None:
                return None
            self._folder.mkdir(exist_ok=True)
            place = _move(path, self._folder)
        except OSError as error:
            raise UsageError(f"{name}: cannot be moved to {FOLDER}: {error.strerror}") from error
        token = secrets.token_hex(8)
        with self._lock:
            self._moved[token] = name, place
            while len(self._moved) > REMEMBERED:
                self._moved.popitem(last=False)
        return token

    def restore(self, token: str) -> str | None:
        """Move an image back and return its name, which is another one if the old one was taken; None without it.

        Raises UsageError when it cannot be moved."""
        with self._lock:
            found = self._moved.pop(token, None)
        if found is None or not found[1].is_file():
            return None
        name, place = found
        try:
            return _move(place, self._gallery.folder, name).name
        except OSError as error:
            raise UsageError(f"{name}: cannot be moved back: {error.strerror}") from error


def _move(path: Path, folder: Path, name: str | None = None) -> Path:
    """Move a file into a folder under `name` (None: its own), or under the first of `name-1`, `name-2`, ... that is
    free; no other file is replaced."""
    first = Path(name or path.name)
    target, number = folder / first, 0
    while not claim(path, target):
        number += 1
        target = folder / f"{first.stem}-{number}{first.suffix}"
    path.unlink(missing_ok=True)
    return target
