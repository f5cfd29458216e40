"""Masks: from a file to pixels, to latents, and to the seam in the finished image.

A mask is a greyscale picture of 0 and 255 only, 255 where the image is generated anew. A reduced mask covers every
pixel that the mask touches even in part, so that no old content shows at the edges. The composite puts back every pixel
outside the mask.
"""

import math
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...schemas.errors import UsageError
from ..engines.protocol import F32
from .pictures import Picture, cover_box, decode, eight_bits, has_alpha, strips

HALF = 128  # the darkest grey that is masked
SAME_SHAPE = 0.01  # how far the proportions of mask and picture may differ

Edges = list[Fraction]


def as_mask(mask: Picture, size: tuple[int, int]) -> Image.Image:
    """The mask for a picture of `size` (width, height): mode L, 255 where the image is generated anew.

    In a mask with transparent pixels, pixels that are at least half opaque are masked, whatever their colour. In any
    other mask, pixels that are at least half white are masked. The mask is scaled to `size`.

    Raises UsageError for a mask that `as_picture` refuses, for other proportions than the picture's, and for an empty
    mask."""
    if isinstance(mask, str | Path):
        name = str(mask)
        stored = decode(Path(mask), lambda *found: _require_shape(name, size, found, found[::-1]))  # EXIF may turn it
    else:
        name, stored = "mask", eight_bits(mask, "mask")
    _require_shape(name, size, stored.size)
    masked = _masked_in(stored)
    if not masked.any():
        raise UsageError(f"{name}: masks nothing; paint the part to be generated anew white, and the rest black")
    edges = [_edges(side, cells) for side, cells in zip(stored.size, size, strict=True)]
    return _to_mask(_touched(masked, edges[1], edges[0]))


def _require_shape(name: str, size: tuple[int, int], *found: tuple[int, int]) -> None:
    """Raise UsageError unless one of the sizes found has the proportions of `size`."""
    if not any(abs(math.log(width / height * size[1] / size[0])) <= SAME_SHAPE for width, height in found):
        raise UsageError(
            f"{name}: a mask of {found[0][0]}x{found[0][1]} for a picture of {size[0]}x{size[1]}; "
            "make it of the picture's size"
        )


def _masked_in(stored: Image.Image) -> NDArray[np.bool_]:
    """True for masked pixels: those half opaque in a picture with transparent pixels, those half white in any other."""
    white = np.empty((stored.height, stored.width), np.bool_)
    opaque = np.empty_like(white) if has_alpha(stored) else None
    for top, strip in strips(stored):
        rows = slice(top, top + strip.height)
        white[rows] = np.asarray(strip.convert("L")) >= HALF
        if opaque is not None:
            opaque[rows] = np.asarray(strip.convert("RGBA"))[..., 3] >= HALF
    return white if opaque is None or opaque.all() else opaque


def fit_mask(mask: Image.Image, width: int, height: int) -> Image.Image:
    """Cut and resize a mask as `pictures.fit` does its picture. Raises UsageError when nothing of the mask is left."""
    box = cover_box(mask.size, width, height)
    columns, rows = _edges(box.right, width, box.left), _edges(box.bottom, height, box.top)
    masked = _touched(_masked(mask), rows, columns)
    if not masked.any():
        raise UsageError(
            f"the mask is outside the middle that {width}x{height} takes from {mask.width}x{mask.height}; "
            "choose a size nearer to the picture's proportions"
        )
    return _to_mask(masked)


def latent_mask(mask: Image.Image, size: tuple[int, int]) -> F32:
    """The mask for latents of `size` (h, w): (1, 1, h, w) float32, 1 where a latent covers any masked pixel, else 0."""
    rows, columns = _edges(mask.height, size[0]), _edges(mask.width, size[1])
    return _touched(_masked(mask), rows, columns).astype(np.float32)[None, None]


def mask_pixels(mask: Image.Image) -> F32:
    """(1, 1, height, width) float32, 1 where masked, else 0."""
    return _masked(mask).astype(np.float32)[None, None]


def composite(original: Image.Image, generated: Image.Image, mask: Image.Image, feather: int = 8) -> Image.Image:
    """Put `generated` into `original` where the mask is; all three have one size, the first two are RGB.

    At 2 * `feather` pixels from the mask and beyond, the result equals `original` bit for bit; nearer, the two are
    blended."""
    share = feathered(mask, feather)[..., None]
    old, new = (np.asarray(picture, np.float32) for picture in (original, generated))
    return Image.fromarray((old + (new - old) * share).round().astype(np.uint8))


def feathered(mask: Image.Image, feather: int) -> F32:
    """The mask with soft edges: (height, width) float32, 1 on the mask, 0 at 2 * `feather` pixels from it and beyond.

    The mask is grown by `feather` pixels across and down. It is then averaged over squares that reach `feather` pixels
    to each side and are cut off at the borders."""
    grown = _square_sum(_masked(mask), feather) > 0
    share: F32 = (_square_sum(grown, feather) / _square_sum(np.ones_like(grown), feather)).astype(np.float32)
    return share


def _square_sum(masked: NDArray[np.bool_], reach: int) -> NDArray[np.int32]:
    """The number of masked pixels in the square around each pixel that reaches `reach` pixels to each side."""
    counts = masked.astype(np.int32)
    for _ in counts.shape:  # along the rows, then along the columns; turned over in between
        total = np.zeros((counts.shape[1] + 1, counts.shape[0]), np.int32)
        np.cumsum(counts.T, axis=0, out=total[1:])
        at = np.arange(counts.shape[1])
        counts = total[np.minimum(at + reach + 1, len(at))] - total[np.maximum(at - reach, 0)]
    return counts


def _masked(mask: Image.Image) -> NDArray[np.bool_]:
    return np.asarray(mask) >= HALF


def _to_mask(masked: NDArray[np.bool_]) -> Image.Image:
    return Image.fromarray(masked.astype(np.uint8) * 255)


def _edges(stop: Fraction | int, cells: int, start: Fraction = Fraction(0)) -> Edges:
    """The `cells` + 1 borders of as many equal cells between `start` and `stop`."""
    return [start + (stop - start) * number / cells for number in range(cells + 1)]


def _touched(masked: NDArray[np.bool_], rows: Edges, columns: Edges) -> NDArray[np.bool_]:
    """True for each cell that any masked pixel reaches into; `rows` and `columns` are borders in pixels of `masked`."""
    return _any_in_rows(_any_in_rows(masked, rows).T, columns).T


def _any_in_rows(masked: NDArray[np.bool_], edges: Edges) -> NDArray[np.bool_]:
    found = np.empty((len(edges) - 1, masked.shape[1]), np.bool_)
    for row, (start, stop) in zip(found, pairwise(edges), strict=True):
        masked[math.floor(start) : math.ceil(stop)].any(axis=0, out=row)
    return found
