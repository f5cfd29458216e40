"""Resizing of arrays as torch's `interpolate` does it; Pillow's filters antialias where they reduce."""

import numpy as np
from numpy.typing import NDArray

from ..engines.protocol import F32


def bilinear(images: F32, size: tuple[int, int], *, align_corners: bool = False) -> F32:
    """Resize (B, c, height, width) float32 to (B, c, *size), bilinear and without antialiasing.

    The middle of the image stays the middle; with `align_corners` the centres of its corner pixels stay in place.
    Rounding follows torch on CPUs with more than one thread. Callers truncate the values to bytes, where the last bit
    may decide."""
    for axis, length in ((-1, size[1]), (-2, size[0])):
        images = _along(images, axis, length, align_corners)
    return images


def _along(images: F32, axis: int, length: int, align_corners: bool) -> F32:
    have = images.shape[axis]
    if have == length:
        return images
    low, share = _places(have, length, align_corners)
    high = np.minimum(low + 1, have - 1)
    share = share if axis == -1 else share[:, None]
    left, right = images.take(low, axis), images.take(high, axis)
    # A fused multiply-add: the product in float64 is exact, and the sum is rounded once.
    fused: F32 = (left.astype(np.float64) * (np.float32(1) - share) + right * share).astype(np.float32)
    return fused


def _places(have: int, length: int, align_corners: bool) -> tuple[NDArray[np.int64], F32]:
    """For each new pixel the old pixel before it, and its distance from that one as a share of a pixel."""
    at = np.arange(length, dtype=np.float32)
    if align_corners:
        place = at * (np.float32(have - 1) / np.float32(max(length - 1, 1)))
    else:
        scale = np.float32(have) / np.float32(length)
        place = (scale.astype(np.float64) * (at + np.float32(0.5)) - 0.5).astype(np.float32).clip(min=0)  # fused too
    low = np.minimum(place.astype(np.int64), have - 1)
    return low, place - low.astype(np.float32)
