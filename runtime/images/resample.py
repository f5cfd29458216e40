"""Resizing arrays as torch's `interpolate` does; Pillow's filters antialias when they make smaller."""

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]


def bilinear(images: F32, size: tuple[int, int], *, align_corners: bool = False) -> F32:
    """(B, c, height, width) float32 to (B, c, *size): between the two nearest pixels each way, without antialiasing.

    The middle of the image stays the middle; with `align_corners` the middles of its corner pixels stay in place.
    Rounded where torch rounds on CPUs with more than one thread, as values that are cut off to bytes afterwards may
    hang on the last bit."""
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
    """For each new pixel the old one before it, and how far it lies towards the next."""
    at = np.arange(length, dtype=np.float32)
    if align_corners:
        place = at * (np.float32(have - 1) / np.float32(max(length - 1, 1)))
    else:
        scale = np.float32(have) / np.float32(length)
        place = (scale.astype(np.float64) * (at + np.float32(0.5)) - 0.5).astype(np.float32).clip(min=0)  # fused too
    low = np.minimum(place.astype(np.int64), have - 1)
    return low, place - low.astype(np.float32)
