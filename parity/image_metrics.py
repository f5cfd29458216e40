"""How alike two images look, as numbers: PSNR and SSIM."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.errors import ParityError

SIGMA, TRUNCATE = 1.5, 3.5  # of the window: 11 values wide
K1, K2 = 0.01, 0.03

Array = NDArray[Any]


def psnr(found: Array, reference: Array) -> float:
    """Peak signal-to-noise ratio in dB of images in 0..1: 10·log10(1 / mean squared error); infinite when equal."""
    mse = float(np.mean((found.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return float("inf") if mse == 0 else float(-10 * np.log10(mse))


def ssim(found: Array, reference: Array) -> float:
    """Mean structural similarity of images (..., height, width) in 0..1, every plane on its own; 1 when equal.

    The settings are those of Wang, Bovik, Sheikh and Simoncelli (IEEE TIP 13(4), 2004): a Gaussian window of deviation
    1.5, 11 pixels wide, and population covariances. Windows that reach over the border are left out. Raises ParityError
    for images of two shapes, or smaller than the window."""
    width = window().size
    if found.shape != reference.shape:
        raise ParityError(f"SSIM takes images of one shape, found {list(found.shape)} and {list(reference.shape)}")
    if found.ndim < 2 or min(found.shape[-2:]) < width:
        raise ParityError(f"SSIM takes images of {width}x{width} and more, found shape {list(found.shape)}")
    x, y = (image.reshape(-1, *image.shape[-2:]) for image in (found, reference))
    planes = [_similarity(one.astype(np.float64), other.astype(np.float64)) for one, other in zip(x, y, strict=True)]
    return float(np.mean(planes))


def window() -> Array:
    """The Gaussian's values at -5..5, which add up to 1."""
    reach = int(TRUNCATE * SIGMA + 0.5)
    values = np.exp(-0.5 * (np.arange(-reach, reach + 1) / SIGMA) ** 2)
    return np.asarray(values / values.sum())


def _similarity(x: Array, y: Array) -> float:
    """The mean similarity of two planes (height, width) float64."""
    mean_x, mean_y = _blurred(x), _blurred(y)
    variance_x, variance_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    c1, c2 = K1**2, K2**2  # for values in 0..1
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity /= (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return float(similarity.mean())


def _blurred(plane: Array) -> Array:
    """The window's mean around every pixel for which it lies inside: (height - 10, width - 10)."""
    weights = window()
    for axis in (0, 1):
        length = plane.shape[axis] - weights.size + 1
        shifted = (np.take(plane, range(i, i + length), axis) * weight for i, weight in enumerate(weights))
        plane = np.asarray(sum(shifted))
    return plane
