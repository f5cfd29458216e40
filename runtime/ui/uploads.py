"""Pictures that the page uploaded, named by their SHA-256, so that no request ever names a file of the server."""

import hashlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from PIL import Image

from ...schemas.errors import UsageError
from ...storage.atomic_file import whole_file
from ..batch.picture_hashes import with_pictures
from ..images.pictures import open_picture

ID = re.compile(r"[0-9a-f]{64}")
MOST_BYTES = 512 << 20  # of all pictures that one server takes
SHOWN = 768  # pixels, the longer side of a picture in the page


class Uploads:
    """Uploaded pictures in the temporary folder `folder`. Pictures that an image was made from are copied to `kept`."""

    def __init__(self, folder: Path, kept: Path) -> None:
        self._folder = folder
        self._kept = kept
        self._lock = Lock()  # held while a picture is added
        self._decoding = Lock()  # one picture at a time: a small file may decode to hundreds of megabytes

    def add(self, content: bytes) -> str:
        """Store the content of a picture's file and return its id.

        Raises UsageError for a file that is no picture, and for pictures of more than MOST_BYTES together."""
        found = hashlib.sha256(content).hexdigest()
        with self._lock:
            self._add(self._folder / found, content)
        return found

    def _add(self, path: Path, content: bytes) -> None:
        if path.exists():
            return
        if sum(file.stat().st_size for file in self._folder.iterdir()) + len(content) > MOST_BYTES:
            raise UsageError(f"more than {MOST_BYTES >> 20} MB of pictures; restart `cascadekit ui` to remove them")
        with whole_file(path) as file:
            file.write(content)
            file.flush()
            try:
                with self._decoding:
                    open_picture(Path(file.name))
            except UsageError as error:
                raise UsageError(str(error).replace(file.name, "the picture")) from error

    def find(self, picture: object) -> Path | None:
        """The file of an id; None without one."""
        if not isinstance(picture, str) or not ID.fullmatch(picture):
            return None
        return next((path for path in (self._folder / picture, self._kept / picture) if path.is_file()), None)

    def path(self, picture: object) -> Path:
        """The file of an id. Raises UsageError without one."""
        path = self.find(picture)
        if path is None:
            raise UsageError("the picture is not on this server (any more); add it again")
        return path

    def shown(self, picture: str) -> Image.Image:
        """The picture in RGB, its longer side at most SHOWN pixels. Raises UsageError for an unknown id."""
        path = self.path(picture)
        with self._decoding:
            small = open_picture(path)
            small.thumbnail((SHOWN, SHOWN))
        return small

    def keep(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Copy the pictures of `metadata` to the folder `kept`, and return the metadata with the paths of the copies.

        Raises OSError when a copy cannot be written."""
        return with_pictures(metadata, self._keep)

    def _keep(self, picture: Mapping[str, Any]) -> dict[str, Any]:
        target = self._kept / Path(picture["path"]).name
        if not target.exists():
            self._kept.mkdir(parents=True, exist_ok=True)
            with Path(picture["path"]).open("rb") as source, whole_file(target) as copy:
                shutil.copyfileobj(source, copy)
        return {**picture, "path": str(target)}
