"""Arrays to images, and image files with the settings that generated them.

A file appears whole or not at all, see `storage.atomic_file`.
"""

from __future__ import annotations  # help() shows the types as they are written here

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, PngImagePlugin

from ...schemas.errors import UsageError
from ...schemas.json_text import dump_json
from ...schemas.messages import reason
from ...storage.atomic_file import claim, finish, remove_leftovers, unplaced_file, whole_file
from ...storage.output_rules import locate, require_apart, require_free, require_writable
from ..engines.protocol import F32
from .photo import FORMATS, OTHERS, is_photo, read_photo_text, write_photo
from .png_text import METADATA_KEY, read_png_text

PREVIEW_KEY = "cascadekit.preview"
Sign = Callable[[bytes, Path, Mapping[str, Any]], bytes]  # an image file, its name and settings to the signed file
MOST_DIGITS = 9  # of an image's number; a longer name is no number


def to_images(pixels: F32) -> list[Image.Image]:
    """(B, 3, height, width) float32, clipped to 0..1, to B 8-bit RGB images; rounds to nearest as diffusers does.

    Examples:
        >>> to_images(cascade.pixels(latents))[0].save("image.png")
    """
    rounded = ((one.clip(0, 1).transpose(1, 2, 0) * 255).round().astype(np.uint8) for one in pixels)
    return [Image.fromarray(one) for one in rounded]


def save_png(
    path: Path, image: Image.Image, settings: Mapping[str, Any], *, force: bool = True, sign: Sign | None = None
) -> None:
    """Write the bytes of `image_bytes` as `save_bytes` does."""
    save_bytes(path, image_bytes(path, image, settings, sign), force=force)


def save_bytes(path: Path, content: bytes, *, force: bool = True) -> None:
    """Write the bytes of an image. Without `force` no file is replaced, even one that has just appeared.

    Raises UsageError when the file cannot be written, or exists without `force`."""
    with _unplaced(path, content) as scratch:
        if force:
            scratch.replace(path)
        elif not claim(scratch, path):
            raise UsageError(f"{path}: exists, another process has just written it; choose another output")


def image_bytes(path: Path, image: Image.Image, settings: Mapping[str, Any], sign: Sign | None = None) -> bytes:
    """The bytes of a file with `image` and its settings, in the format that the name of `path` ends in.

    A PNG has the settings as JSON in its text chunk "cascadekit"; see `photo.write_photo` for the others. `sign` signs
    the file, see `provenance`."""
    file = BytesIO()
    if path.suffix.lower() in FORMATS:
        write_photo(file, path, image, settings)
    else:
        _write_png(file, image, METADATA_KEY, dump_json(settings))
    return file.getvalue() if sign is None else sign(file.getvalue(), path, settings)


def save_numbered(path: Path, image: Image.Image, settings: Mapping[str, Any], *, sign: Sign | None = None) -> Path:
    """Write `image` as `save_png` does, and return its path: `path`, or the next free number if that one was taken.

    Raises UsageError when the file cannot be written."""
    with _unplaced(path, image_bytes(path, image, settings, sign)) as scratch:
        while not claim(scratch, path):
            path = path.with_name(f"{int(path.stem) + 1:04d}.png")
    return path


def preview_path(path: Path) -> Path:
    """The path of the previews of the image at `path` while it is generated."""
    return path.with_name(f"{path.stem}.preview.png")


def save_preview(path: Path, image: Image.Image) -> None:
    """Write `image` as a preview of the image that will be at `path`. Raises OSError when it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(preview_path(path)) as file:
        _write_png(file, image, PREVIEW_KEY, path.name)


def remove_preview(path: Path) -> None:
    """Remove the preview of the image at `path`; any other file of that name stays."""
    if _is_preview(preview_path(path)):
        preview_path(path).unlink(missing_ok=True)


def require_free_previews(paths: Iterable[Path]) -> None:
    """Raise UsageError when a file that is no preview has the name of a preview of one of the images at `paths`."""
    for place in map(preview_path, paths):
        if os.path.lexists(place) and not _is_preview(place):
            raise UsageError(f"{place}: exists and is no preview; choose another output, or set preview_every=None")


def _is_preview(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            return not path.is_symlink() and PREVIEW_KEY in image.info
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def _write_png(file: IO[bytes], image: Image.Image, key: str, text: str) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(key, text)
    image.save(file, format="PNG", pnginfo=info)


@contextmanager
def _unplaced(path: Path, content: bytes) -> Iterator[Path]:
    """Write an image to a hidden file beside `path`; the caller gives that file its name."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unplaced_file(path) as (file, scratch):
            file.write(content)
            finish(file)
            yield scratch
    except OSError as error:
        raise UsageError(f"{path}: the image cannot be written: {error.strerror}; choose another output") from error


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings in an image written by `save_png`, or None when it has none.

    Raises OSError when the file cannot be read, ValueError when it is no PNG, JPEG or WebP, or its settings are no
    JSON."""
    return (read_photo_text(path) if is_photo(path) else read_png_text(path)).settings()


def require_settings(path: Path) -> dict[str, Any]:
    """The settings in an image written by `save_png`. Raises UsageError when it cannot be read or has none."""
    try:
        settings = read_settings(path)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path}: cannot be read as an image of cascadekit: {reason(error)}; give another file"
        ) from error
    if not isinstance(settings, dict):
        raise UsageError(
            f"{path}: has no settings of cascadekit; image editors drop them, give the file as it was written"
        )
    return settings


def image_paths(output: Path, count: int, *, force: bool = False, sources: Iterable[str | Path] = ()) -> list[Path]:
    """The paths for `count` images: `output` itself when it is named as an image, else the next free numbers in it.

    `save_numbered` takes these numbers unless another process is first. Half-written images of killed processes are
    removed from the folder.

    Raises UsageError when one file is named for several images, or exists without `force`. Raises it too when an image
    would be written into one of the `sources` or replace it."""
    require_writable(locate(output))
    if output.suffix.lower() in (".png", *FORMATS) and not output.is_dir():
        if count > 1:
            raise UsageError(f"{output}: one file for {count} images; give a folder")
        require_apart(output, sources)
        require_free(output, force=force)
        remove_leftovers(output.parent, _is_image)
        return [output]
    names = ", ".join((".png", *FORMATS))
    if os.path.lexists(output) and not output.is_dir():
        raise UsageError(f"{output}: expected a folder, or a name ending in {names}")
    if output.suffix.lower() in OTHERS and not output.is_dir():
        raise UsageError(f"{output}: images are not written in this format; give a folder, or a name ending in {names}")
    stems = (path.stem for path in output.glob("*.png"))
    first = max((int(stem) for stem in stems if stem.isdecimal() and len(stem) <= MOST_DIGITS), default=-1) + 1
    paths = [output / f"{number:04d}.png" for number in range(first, first + count)]
    require_apart(paths[0], sources)
    remove_leftovers(output, _is_image)
    return paths


def _is_image(name: str) -> bool:
    return name.lower().endswith((".png", *FORMATS))
