"""The finished images in a folder, newest first, with the settings that made them."""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ...schemas.errors import UsageError
from ...schemas.limits import MAX_SHOWN_PIXELS, MAX_SHOWN_TEXT
from ...schemas.request import understood
from ..batch.picture_hashes import with_pictures
from ..images.png_text import read_png_text
from .uploads import Uploads

Described = dict[str, Any]
Known = tuple[str, int]  # an image by its name and its time in nanoseconds

SUFFIX = ".png"
REMEMBERED = 1 << 16  # images that are not read again as long as they have the same time
NAMED = 20  # settings that are not understood and are listed by name
LONGEST_NAME = 60  # characters of such a setting's name


class Gallery:
    """Shows the images of one folder that carry settings of cascadekit."""

    def __init__(self, folder: Path, pictures: Uploads) -> None:
        """Raises UsageError when `folder` exists and is not a folder."""
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder}: expected a folder for the images")
        self.folder = folder
        self._pictures = pictures

    def newest(self, count: int, search: str = "") -> tuple[list[Described], bool]:
        """The `count` newest images, and whether there are more. With `search`, only images that have each of its words
        in their prompts, their name or their seed. Raises UsageError for a folder that cannot be read."""
        words = search.casefold().split()
        files = sorted(self._files(), key=lambda known: (known[1], known[0]), reverse=True)
        found: list[Described] = []
        for name, time in files:
            described = self._described(name, time)
            if described is None or not all(word in _searched(described) for word in words):
                continue
            if len(found) == count:
                return found, True
            found.append(described)
        return found, False

    def describe(self, path: Path) -> Described | None:
        """Name, size, time in seconds and settings of an image; None when it carries no settings."""
        return self._described(path.name, path.stat().st_mtime_ns)

    def file(self, name: str) -> Path | None:
        """The path of an image of the folder; None when it has no image of that name."""
        return next((self.folder / found for found, _ in self._files() if found == name), None)

    def _files(self) -> Iterator[Known]:
        """The images, without hidden files, and without links, which may lead out of the folder."""
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    with suppress(FileNotFoundError):
                        named = entry.name.endswith(SUFFIX) and not entry.name.startswith(".")
                        if named and entry.is_file(follow_symlinks=False):
                            yield entry.name, entry.stat(follow_symlinks=False).st_mtime_ns
        except FileNotFoundError:
            return  # before the first image
        except OSError as error:
            raise UsageError(f"{self.folder}: the images cannot be listed: {error.strerror}") from error

    def _described(self, name: str, time: int) -> Described | None:
        found = _read(self.folder / name, time)
        if found is None:
            return None
        encoded = os.fsencode(name)  # which may be no UTF-8
        shown, url = encoded.decode("utf-8", "replace"), f"/images/{quote(encoded, safe='')}?{time}"
        settings = with_pictures(found["settings"], self._by_id)
        return {**found, "name": shown, "url": url, "time": time // 10**9, "settings": settings}

    def _by_id(self, picture: Mapping[str, Any]) -> Described:
        """A picture of an image's settings with its id in place of its path."""
        rest = {name: picture[name] for name in ("name", "strength") if name in picture}
        here = self._pictures.find(picture["sha256"])
        return {**rest, "picture": picture["sha256"] if here else None, "file": _printable(Path(picture["path"]).name)}


@lru_cache(REMEMBERED)
def _read(path: Path, time: int) -> Described | None:
    """Size and settings of an image, and under "odd" the names of settings that this version does not understand.

    The image is read again when its `time` has changed."""
    try:
        png = read_png_text(path)
        given = png.settings()
    except (OSError, ValueError):
        return None  # no image of cascadekit
    if given is None or not png.whole or not 0 < png.width * png.height <= MAX_SHOWN_PIXELS:
        return None
    settings, odd = understood({name: value for name, value in given.items() if not _is_long(value)})
    odd += [name for name, value in given.items() if _is_long(value)]
    if "seed" in settings:
        settings["seed"] = str(settings["seed"])  # JavaScript has no integers of 64 bits
    return {"width": png.width, "height": png.height, "settings": settings, "odd": _names(odd)}


def _searched(described: Described) -> str:
    settings = described["settings"]
    texts = (settings.get("prompt", ""), settings.get("negative", ""), described["name"], settings.get("seed", ""))
    return "\n".join(texts).casefold()


def _is_long(value: Any) -> bool:
    return isinstance(value, str) and len(value) > MAX_SHOWN_TEXT


def _names(odd: list[str]) -> list[str]:
    more = [f"and {len(odd) - NAMED} more"] if len(odd) > NAMED else []
    return [*(_printable(name)[:LONGEST_NAME] for name in odd[:NAMED]), *more]


def _printable(text: str) -> str:
    """The text with a mark for each byte that is no text, and for each half of a surrogate pair."""
    return text.encode("utf-8", "replace").decode()
