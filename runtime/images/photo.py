"""Images as JPEG and WebP, with the settings that generated them as a comment in their EXIF data."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any
from warnings import catch_warnings

from PIL import ExifTags, Image

from ...schemas.errors import UsageError
from ...schemas.limits import MAX_SETTINGS
from .png_text import ImageText

COMMENT = 0x9286  # EXIF's UserComment: 8 bytes that name the encoding, then the text
ASCII = b"ASCII\0\0\0"
MARK = b"cascadekit "  # before the JSON: other programs write comments, too
MOST_EXIF_BYTES = 65_000  # a JPEG's segment holds 65,533
BEGINS = {"JPEG": b"\xff\xd8\xff", "WEBP": b"RIFF"}

# By the end of the name: Pillow's format and options. WebP keeps every pixel; JPEG at 95 has no visible error.
FORMATS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"lossless": True}),
}
# Ends of names that mean a picture, but that no image is written as.
OTHERS = (".avif", ".bmp", ".gif", ".heic", ".jp2", ".jxl", ".tif", ".tiff")


def write_photo(file: IO[bytes], path: Path, image: Image.Image, settings: Mapping[str, Any]) -> None:
    """Write `image` into `file` in the format of the name of `path`. Raises UsageError for too long settings."""
    kind, options = FORMATS[path.suffix.lower()]
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[COMMENT] = ASCII + MARK + json.dumps(settings).encode("ascii")
    content = exif.tobytes()
    if len(content) > MOST_EXIF_BYTES:
        raise UsageError(
            f"{path}: its settings take {len(content)} bytes, and {kind} holds {MOST_EXIF_BYTES}; give a name that "
            "ends in .png"
        )
    image.save(file, format=kind, exif=content, **options)


def is_photo(path: Path) -> bool:
    """True when the file at `path` begins as a JPEG or WebP does. Raises OSError when it cannot be read."""
    with path.open("rb") as file:
        return file.read(4).startswith(tuple(BEGINS.values()))


def read_photo_text(path: Path) -> ImageText:
    """The size, and the JSON that `write_photo` put into the file if there is any. The pixels are not decoded.

    Raises OSError when the file cannot be read, ValueError when its EXIF data are damaged or too long."""
    try:
        with catch_warnings(action="ignore"), Image.open(path, formats=list(BEGINS)) as image:
            comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(COMMENT)
            size = image.size
    except (OSError, ValueError):
        raise
    except (Image.DecompressionBombError, ArithmeticError, LookupError, SyntaxError, TypeError, struct.error) as error:
        raise ValueError(f"its EXIF data are damaged: {error}") from error
    content = comment if isinstance(comment, bytes) else b""
    if not content.startswith(ASCII + MARK):
        return ImageText(*size, None)
    if len(content) > MAX_SETTINGS:
        raise ValueError(f"settings of {len(content)} bytes; expected at most {MAX_SETTINGS}")
    return ImageText(*size, content[len(ASCII + MARK) :].decode("ascii"))
