"""Reads the pictures that users give, and turns them into the arrays that the encoders take.

A picture is a path or a PIL image. Colours are taken as they are stored, as Stability's code and diffusers do; an ICC
profile is not applied.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ...schemas.callbacks import ignored
from ...schemas.errors import UsageError
from ...schemas.limits import JPEG_PIXELS, MAX_PICTURE_BYTES, MAX_PICTURE_SIDE, PICTURE_BYTES
from ...schemas.messages import one_line
from ..engines.protocol import F32

# Mean and deviation of ImageNet's red, green and blue, with which the EfficientNet was trained.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Mean and deviation of red, green and blue, with which CLIP was trained.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

EFFNET_COMPRESSION = 32  # image pixels for each pixel of the effnet encoder's map
STEEPEST = 500  # how many times longer than the other a side may be where CLIP's square is cut out
SIXTEEN_BITS = 65535
WHITE = (255, 255, 255, 255)
STRIP_PIXELS = 1 << 20  # converted at a time, so that no second picture of more bytes is needed

Picture = Image.Image | str | Path


class Box(NamedTuple):
    """The part of a picture that is kept, in its pixels."""

    left: Fraction
    top: Fraction
    right: Fraction
    bottom: Fraction


def as_picture(picture: Picture) -> Image.Image:
    """The picture as 8-bit RGB: a path is opened, a PIL image of another mode is converted in the same way.

    Raises UsageError as `open_picture` does, and for an object of another type."""
    return open_picture(Path(picture)) if isinstance(picture, str | Path) else _rgb(eight_bits(picture, "picture"))


def as_pictures(pictures: Picture | Sequence[Picture]) -> list[Image.Image]:
    """One picture or several as a list of 8-bit RGB pictures, see `as_picture`."""
    if isinstance(pictures, Image.Image | str | Path) or not isinstance(pictures, Iterable):
        return [as_picture(pictures)]
    return [as_picture(picture) for picture in pictures]


def open_picture(path: Path) -> Image.Image:
    """The first picture in a file as 8-bit RGB, turned according to its EXIF data.

    White shows through transparent pixels, as in transformers. 16 bits are rounded to 8. Decoding takes `PICTURE_BYTES`
    a pixel. A JPEG beyond `JPEG_PIXELS` is decoded at a half, a quarter or an eighth of its size.

    Raises UsageError for a file that is no picture, is damaged, or is larger than `schemas.limits` allows."""
    return _rgb(decode(path))


def _rgb(picture: Image.Image) -> Image.Image:
    if has_alpha(picture):
        return _converted(picture, "RGB", _over_white)
    return picture if picture.mode == "RGB" else _converted(picture, "RGB", lambda strip: strip.convert("RGB"))


def clip_pixels(pictures: Sequence[Image.Image], size: int = 224) -> F32:
    """n RGB pictures to the `pixel_values` of the image encoder: (n, 3, size, size) float32.

    The steps are those of transformers' CLIPImageProcessor on Pillow. `size` is the image_size of the encoder's config.
    Raises UsageError for a picture with one side more than 500 times the other."""
    mean, std = np.array(CLIP_MEAN, np.float32), np.array(CLIP_STD, np.float32)
    squares = [(_scaled(_centre_square(picture, size)) - mean) / std for picture in pictures]
    return np.ascontiguousarray(np.stack(squares).transpose(0, 3, 1, 2))


def fit(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Cut out the middle of the picture with the proportions of `width` x `height`, and resize it (Lanczos)."""
    box = cover_box(picture.size, width, height)
    edges = (float(box.left), float(box.top), float(box.right), float(box.bottom))
    return picture.resize((width, height), Image.Resampling.LANCZOS, box=edges)


def cover_box(size: tuple[int, int], width: int, height: int) -> Box:
    """The box that `fit` cuts out of a picture of `size` (width, height)."""
    scale = min(Fraction(size[0], width), Fraction(size[1], height))
    left, top = ((have - wanted * scale) / 2 for have, wanted in zip(size, (width, height), strict=True))
    return Box(left, top, size[0] - left, size[1] - top)


def effnet_pixels(images: F32) -> F32:
    """(B, 3, height, width) float32 in 0..1 to the effnet encoder's `pixels`, of the same shape."""
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


def effnet_input(picture: Image.Image, prior_size: tuple[int, int]) -> F32:
    """The picture as the effnet encoder's `pixels`: (1, 3, 32h, 32w) float32 for prior latents of size (h, w).

    The encoder makes a map of (h, w) of these. A 1024x1024 image has 24x24 prior latents and 768x768 pixels here."""
    height, width = (EFFNET_COMPRESSION * side for side in prior_size)
    return effnet_pixels(fitted_pixels(picture, height, width))


def fitted_pixels(picture: Image.Image, height: int, width: int) -> F32:
    """An 8-bit picture, fitted, to (1, channels, height, width) float32 in 0..1, as the vqgan's encoder takes it."""
    pixels = np.atleast_3d(np.asarray(fit(picture, width, height))).astype(np.float32) / 255
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


def decode(path: Path, check: Callable[[int, int], object] = ignored) -> Image.Image:
    """The picture in a file in its own mode, turned according to its EXIF data; 16-bit greys become 8-bit.

    `check` is called with the stored width and height before any pixel is read, and may raise. Raises UsageError as
    `open_picture` does."""
    require_picture_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of pictures larger than half of Pillow's limit
            with Image.open(path, formats=_known_formats()) as picture:
                _require_size(path, picture)
                check(*picture.size)
                picture.draft(None, _enough(picture.size))  # only JPEGs can; the others ignore it
                picture.load()
                ImageOps.exif_transpose(picture, in_place=True)
    except UsageError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(path, 2 * (Image.MAX_IMAGE_PIXELS or 0)) from error
    except UnidentifiedImageError as error:
        raise UsageError(f"{path}: not a picture of a known format; give a PNG, JPEG or WebP file") from error
    except Exception as error:  # decoders raise any exception on damaged files
        raise UsageError(
            f"{path}: the picture cannot be decoded: {one_line(error, 400)}; save it again, or give another"
        ) from error
    return eight_bits(picture, str(path))


def require_picture_file(path: Path) -> None:
    """Raise UsageError unless there is a regular file at `path`."""
    if not path.is_file():
        found = "a folder; give a file in it" if path.is_dir() else "no such file; check the path"
        raise UsageError(f"{path}: expected a picture, found {found}")


def strips(picture: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The picture in pieces of its whole width, each with the row it begins at."""
    rows = max(1, STRIP_PIXELS // picture.width)
    for top in range(0, picture.height, rows):
        yield top, picture.crop((0, top, picture.width, min(top + rows, picture.height)))


def has_alpha(picture: Image.Image) -> bool:
    """True if some of the picture may be transparent."""
    return picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info


def _known_formats() -> list[str]:
    """The formats of the table that this Pillow can open. Others are not tried: EPS would start another program."""
    Image.init()
    return [name for name in PICTURE_BYTES if name in Image.OPEN]


def _require_size(path: Path, picture: Image.Image) -> None:
    kind = "progressive JPEG" if picture.info.get("progressive") else picture.format or ""
    most = MAX_PICTURE_BYTES // PICTURE_BYTES.get(kind, max(PICTURE_BYTES.values()))
    if picture.width * picture.height > most:
        raise _too_large(path, most)
    if max(picture.size) > MAX_PICTURE_SIDE:
        raise UsageError(
            f"{path}: a picture of {picture.width}x{picture.height}: expected sides of at most {MAX_PICTURE_SIDE} "
            "pixels; cut a piece out of it"
        )


def _too_large(path: Path, most: int) -> UsageError:
    return UsageError(f"{path}: expected a picture of at most {most // 10**6} megapixels; make it smaller")


def _enough(size: tuple[int, int]) -> tuple[int, int]:
    """The smallest size at which a JPEG may be decoded: its own, or halved until it has at most JPEG_PIXELS."""
    width, height = size
    while width * height > JPEG_PIXELS:
        width, height = -(-width // 2), -(-height // 2)
    return width, height


def _over_white(strip: Image.Image) -> Image.Image:
    ground = Image.new("RGBA", strip.size, WHITE)
    return Image.alpha_composite(ground, strip.convert("RGBA")).convert("RGB")


def _converted(picture: Image.Image, mode: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """The picture in another mode, strip by strip."""
    made = Image.new(mode, picture.size)
    for top, strip in strips(picture):
        made.paste(convert(strip), (0, top))
    return made


def eight_bits(picture: Image.Image, name: str) -> Image.Image:
    """A grey picture of 16 bits as one of 8 bits; Pillow may hold the 16 bits as 32.

    Raises UsageError for pixels without a fixed colour: floats, L*a*b* and 32 bits, and for an object of another type.
    """
    if not isinstance(picture, Image.Image):
        raise UsageError(f"expected a picture as a path or a PIL image, found {type(picture).__name__}")
    if picture.mode in ("F", "LAB"):
        kind = "floats" if picture.mode == "F" else "L*a*b* colours"
        raise UsageError(f"{name}: a picture of {kind}, which screens show in different ways; save it as a PNG")
    if picture.mode != "I" and not picture.mode.startswith("I;16"):
        return picture

    def rounded(strip: Image.Image) -> Image.Image:
        values = np.asarray(strip)
        if values.min() < 0 or values.max() > SIXTEEN_BITS:
            raise UsageError(f"{name}: a picture of 32-bit integers; save it with 8 or 16 bits")
        return Image.fromarray((values / (SIXTEEN_BITS / 255)).round().astype(np.uint8))

    return _converted(picture, "L", rounded)


def _centre_square(picture: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side to `size` (bicubic) and cut out the middle square."""
    short, long = sorted(picture.size)
    if long > STEEPEST * short:
        raise UsageError(
            f"an image prompt of {picture.width}x{picture.height}: expected sides that differ {STEEPEST}-fold at most; "
            "cut a piece out of it"
        )
    scaled = int(size * long / short)  # cut off, not rounded, as transformers does
    wide, high = (size, scaled) if picture.width <= picture.height else (scaled, size)
    left, top = (wide - size) // 2, (high - size) // 2
    return picture.resize((wide, high), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def _scaled(picture: Image.Image) -> F32:
    """(height, width, 3) float32 in 0..1, multiplied in float64 as transformers does."""
    return (np.asarray(picture).astype(np.float64) * (1 / 255)).astype(np.float32)
