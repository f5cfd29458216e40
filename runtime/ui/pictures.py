"""Pictures that the page was given: named by their SHA-256, so that no request ever names a file of the server."""

import hashlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from PIL import Image

from ...schemas.errors import UsageError
from ..images.pictures import open_picture

ID = re.compile(r"[0-9a-f]{64}")
MOST_BYTES = 512 << 20  # of all pictures given to one server
SHOWN = 768  # pixels, the longer side of a picture in the page
REFERENCES = ("image_prompts", "controls", "init_image", "mask")  # fields of metadata that name pictures


class Pictures:
    """Pictures in a temporary folder, and those that images were made from in a folder beside these images."""

    def __init__(self, folder: Path, kept: Path) -> None:
        self._folder = folder
        self._kept = kept
        self._lock = Lock()  # of what is added
        self._decoding = Lock()  # one at a time: a small file may take hundreds of megabytes

    def add(self, content: bytes) -> str:
        """Store a picture's file and return its id. Raises UsageError when it is none, or there are too many."""
        found = hashlib.sha256(content).hexdigest()
        with self._lock:
            self._add(self._folder / found, content)
        return found

    def _add(self, path: Path, content: bytes) -> None:
        if path.exists():
            return
        if sum(file.stat().st_size for file in self._folder.iterdir()) + len(content) > MOST_BYTES:
            raise UsageError(f"more than {MOST_BYTES >> 20} MB of pictures; start cascadekit ui again to drop them")
        scratch = path.with_suffix(".new")
        scratch.write_bytes(content)
        try:
            with self._decoding:
                open_picture(scratch)
        except UsageError as error:
            scratch.unlink()
            raise UsageError(str(error).replace(str(scratch), "the picture")) from error
        scratch.replace(path)

    def find(self, picture: object) -> Path | None:
        """The file of an id."""
        if not isinstance(picture, str) or not ID.fullmatch(picture):
            return None
        return next((path for path in (self._folder / picture, self._kept / picture) if path.is_file()), None)

    def path(self, picture: object) -> Path:
        """The file of an id. Raises UsageError when there is none."""
        path = self.find(picture)
        if path is None:
            raise UsageError("a picture that this page was not given; add it again")
        return path

    def shown(self, picture: str) -> Image.Image:
        """A small RGB picture, whatever the file's format. Raises UsageError for an unknown id."""
        path = self.path(picture)
        with self._decoding:
            small = open_picture(path)
            small.thumbnail((SHOWN, SHOWN))
        return small

    def keep(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Metadata that names pictures where they stay: copied beside the images, once, under their ids."""
        return {name: self._keep(value) if name in REFERENCES and value else value for name, value in metadata.items()}

    def _keep(self, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return [self._keep(each) for each in value]
        target = self._kept / Path(value["path"]).name
        if not target.exists():
            self._kept.mkdir(parents=True, exist_ok=True)
            scratch = target.with_suffix(".new")
            shutil.copyfile(value["path"], scratch)
            scratch.replace(target)
        return {**value, "path": str(target)}
