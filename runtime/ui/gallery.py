"""The finished images in a folder, newest first, with the settings that made them."""

from pathlib import Path
from typing import Any

from PIL import Image

from ...schemas.errors import UsageError
from ..images import read_settings
from .pictures import REFERENCES, Pictures

Described = dict[str, Any]


class Gallery:
    """Shows the images of one folder that carry settings of cascadekit."""

    def __init__(self, folder: Path, pictures: Pictures) -> None:
        """Raises UsageError when `folder` is something else."""
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder}: expected a folder for the images")
        self.folder = folder
        self._pictures = pictures
        self._known: dict[tuple[str, int], Described | None] = {}

    def newest(self, count: int) -> tuple[list[Described], bool]:
        """The `count` newest images, and whether there are more."""
        times = {path: path.stat().st_mtime_ns for path in self._files()}
        found: list[Described] = []
        for path in sorted(times, key=lambda path: (times[path], path.name), reverse=True):
            described = self.describe(path)
            if described and len(found) == count:
                return found, True
            found += [described] if described else []
        return found, False

    def describe(self, path: Path) -> Described | None:
        """Name, size, time in seconds and settings of an image; None when it carries no settings."""
        time = path.stat().st_mtime_ns
        key = path.name, time
        if key not in self._known:
            self._known[key] = _read(path)
        found = self._known[key]
        if found is None:
            return None
        url = f"/images/{path.name}?{time}"
        return {**found, "name": path.name, "url": url, "time": time // 10**9, **self._for_page(found["settings"])}

    def file(self, name: str) -> Path | None:
        """The image of that name, when it is one of the folder's own."""
        return next((path for path in self._files() if path.name == name), None)

    def _files(self) -> list[Path]:
        """Never hidden files, nor links, which may lead out of the folder."""
        return [p for p in self.folder.glob("*.png") if p.is_file() and not p.is_symlink() and p.name[0] != "."]

    def _for_page(self, settings: Described) -> Described:
        """Settings with ids in place of paths, and the seed as text: JavaScript has no integers of 64 bits."""
        shown = {name: self._by_id(value) if name in REFERENCES else value for name, value in settings.items()}
        if "seed" in shown:
            shown["seed"] = str(shown["seed"])
        return {"settings": shown}

    def _by_id(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._by_id(each) for each in value]
        if not isinstance(value, dict):
            return None
        rest = {name: value[name] for name in ("name", "strength") if name in value}
        here = self._pictures.find(value.get("sha256"))
        return {**rest, "picture": value["sha256"] if here else None, "file": Path(str(value.get("path"))).name}


def _read(path: Path) -> Described | None:
    try:
        settings = read_settings(path)
        with Image.open(path) as picture:
            width, height = picture.size
    except (OSError, ValueError, SyntaxError, RecursionError, Image.DecompressionBombError):
        return None  # no image of ours
    return {"width": width, "height": height, "settings": settings} if isinstance(settings, dict) else None
