"""Arrays to pictures, and PNG files that say how they were made."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from ..schemas.errors import UsageError
from ..schemas.json_text import dump_json, load_json
from .whole_file import whole_file

METADATA_KEY = "cascadekit"

# Mean and deviation of ImageNet's red, green and blue, with which the EfficientNet was trained.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def effnet_pixels(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """(B, 3, height, width) float32 in 0..1 to the pixels that the effnet encoder takes, same shape."""
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


def to_pictures(images: NDArray[np.float32]) -> list[Image.Image]:
    """(B, 3, height, width) float32 in 0..1 (clipped to it) to 8-bit RGB, rounding to nearest as diffusers does."""
    pixels = (images.clip(0, 1).transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)
    return [Image.fromarray(picture) for picture in pixels]


def save_png(path: Path, picture: Image.Image, settings: Mapping[str, Any]) -> None:
    """Write `picture` with `settings` as JSON in its text chunk "cascadekit"; the file appears whole or not at all.

    Raises UsageError when the file cannot be written."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(METADATA_KEY, dump_json(settings))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            picture.save(file, format="PNG", pnginfo=info)
    except OSError as error:
        raise UsageError(f"{path}: the image cannot be written: {error.strerror}; choose another -o") from error


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings in a PNG written by `save_png`, None when it carries none. Raises ValueError for what is no JSON."""
    with Image.open(path) as picture:
        text = picture.info.get(METADATA_KEY)
    return load_json(text) if isinstance(text, str) else None


def require_settings(path: Path) -> dict[str, Any]:
    """The settings in a PNG written by `save_png`. Raises UsageError when it cannot be read or carries none."""
    try:
        settings = read_settings(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as an image made by cascadekit: {error}") from error
    if not isinstance(settings, dict):
        raise UsageError(f"{path}: has no settings of cascadekit; editors drop them, take the file as it was written")
    return settings


def image_paths(output: Path, count: int, *, force: bool = False) -> list[Path]:
    """Where `count` images go: `output` itself when it ends in .png, otherwise the next free numbers in that folder.

    Raises UsageError when one file is named for several images, or exists without `force`."""
    if output.suffix.lower() == ".png":
        if count > 1:
            raise UsageError(f"{output}: one file for {count} images; give a folder")
        if output.exists() and not force:
            raise UsageError(f"{output}: exists already; give another -o or --force to replace it")
        return [output]
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output}: expected a folder or a name ending in .png")
    taken = [int(path.stem) for path in output.glob("*.png") if path.stem.isdecimal()]
    first = max(taken, default=-1) + 1
    return [output / f"{number:04d}.png" for number in range(first, first + count)]
