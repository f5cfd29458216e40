"""Masks: what of them touches larger cells, counted pixel by pixel, and what a composite leaves alone."""

from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cascadekit.runtime.images.masks import as_mask, composite, feathered, fit_mask, latent_mask, mask_pixels
from cascadekit.runtime.images.pictures import fit
from cascadekit.schemas.errors import UsageError

Array = np.ndarray


def spots(width: int, height: int, count: int, seed: int = 0) -> Array:
    """A few single masked pixels."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    mask[rng.integers(0, height, count), rng.integers(0, width, count)] = 255
    return mask


def touched(mask: Array, box: tuple[Fraction, ...], rows: int, columns: int) -> Array:
    """Every masked pixel as a square, every cell as a rectangle: do they overlap?"""
    left, top, right, bottom = box
    found = np.zeros((rows, columns), bool)
    for y, x in np.argwhere(mask):
        for row, column in product(range(rows), range(columns)):
            up, down = (top + (bottom - top) * r / rows for r in (row, row + 1))
            west, east = (left + (right - left) * c / columns for c in (column, column + 1))
            found[row, column] |= bool(max(int(y), up) < min(int(y) + 1, down) and max(x, west) < min(int(x) + 1, east))
    return found


@pytest.mark.parametrize("size", [(6, 6), (5, 7), (48, 40), (60, 50)])
def test_latents_that_any_masked_pixel_reaches_into(size: tuple[int, int]) -> None:
    mask = spots(40, 48, 4)
    found = latent_mask(Image.fromarray(mask), size)
    assert found.dtype == np.float32
    assert found.shape == (1, 1, *size)
    everything = (Fraction(0), Fraction(0), Fraction(40), Fraction(48))
    assert np.array_equal(found[0, 0] == 1, touched(mask, everything, *size))
    assert set(np.unique(found)) <= {0.0, 1.0}


def test_one_pixel_on_the_border_of_two_latents_masks_both() -> None:
    mask = np.zeros((1024, 1024), np.uint8)
    mask[100, 42] = 255  # latents are 42.67 pixels wide: the first border lies inside pixel 42
    found = latent_mask(Image.fromarray(mask), (24, 24))[0, 0]
    assert [tuple(at) for at in np.argwhere(found)] == [(2, 0), (2, 1)]


@pytest.mark.parametrize(("width", "height"), [(16, 16), (8, 24), (50, 20)])
def test_a_mask_is_cut_as_its_picture(width: int, height: int) -> None:
    mask = spots(41, 30, 40, seed=2)
    scale = min(Fraction(41, width), Fraction(30, height))
    left, top = (41 - width * scale) / 2, (30 - height * scale) / 2
    box = (left, top, left + width * scale, top + height * scale)
    fitted = fit_mask(Image.fromarray(mask), width, height)
    assert fitted.size == fit(Image.fromarray(mask), width, height).size
    assert np.array_equal(np.asarray(fitted) == 255, touched(mask, box, height, width))
    assert np.array_equal(mask_pixels(fitted)[0, 0] == 1, np.asarray(fitted) == 255)


def test_a_mask_outside_what_is_taken() -> None:
    mask = np.zeros((30, 90), np.uint8)
    mask[:, :5] = 255
    with pytest.raises(UsageError, match="is outside the middle that 64x64 takes from 90x30"):
        fit_mask(Image.fromarray(mask), 64, 64)


def test_opening_masks(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (6, 8), dtype=np.uint8)
    path = tmp_path / "mask.png"

    def opened(picture: Image.Image, size: tuple[int, int] = (8, 6)) -> Array:
        picture.save(path)
        mask = as_mask(path, size)
        assert mask.mode == "L"
        assert mask.tobytes() == as_mask(picture, size).tobytes()  # a PIL image is read as its file is
        return np.asarray(mask)

    expected = np.where(grey >= 128, 255, 0)
    assert np.array_equal(opened(Image.fromarray(grey)), expected)
    colours = np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    layer = Image.fromarray(np.dstack([colours, grey]))
    assert np.array_equal(opened(layer), expected)  # painted on a transparent layer, in any colour
    solid = Image.merge("RGBA", [*[Image.fromarray(grey)] * 3, Image.new("L", (8, 6), 255)])
    assert np.array_equal(opened(solid), expected)  # an alpha that says nothing
    assert np.array_equal(opened(Image.fromarray(grey.astype(np.uint16) * 257)), expected)
    assert np.array_equal(opened(Image.fromarray(grey), (16, 12)), expected.repeat(2, 0).repeat(2, 1))
    with pytest.raises(UsageError, match="a mask of 8x6 for a picture of 8x8; make it of the picture's size"):
        opened(Image.fromarray(grey), (8, 8))
    with pytest.raises(UsageError, match="masks nothing; paint the part to be generated anew white"):
        opened(Image.new("L", (8, 6), 100))
    with pytest.raises(UsageError, match="no such file"):
        as_mask(tmp_path / "absent.png", (8, 6))
    with pytest.raises(UsageError, match="mask: a mask of 8x6 for a picture of 8x8"):
        as_mask(Image.fromarray(grey), (8, 8))
    with pytest.raises(UsageError, match="mask: a picture of floats"):
        as_mask(Image.fromarray(grey.astype(np.float32)), (8, 6))


@pytest.mark.parametrize("feather", [0, 1, 3])
def test_a_composite(feather: int) -> None:
    rng = np.random.default_rng(5)
    old, new = (rng.integers(0, 256, (30, 33, 3), dtype=np.uint8) for _ in range(2))
    mask = np.zeros((30, 33), np.uint8)
    mask[10:14, 12:15] = mask[0, 30] = 255
    found = np.asarray(composite(*map(Image.fromarray, (old, new, mask)), feather=feather))
    masked = mask > 0
    assert np.array_equal(found[masked], new[masked])
    near = np.zeros_like(masked)
    for y, x in np.argwhere(masked):
        near[max(y - 2 * feather, 0) : y + 2 * feather + 1, max(x - 2 * feather, 0) : x + 2 * feather + 1] = True
    assert np.array_equal(found[~near], old[~near])
    share = feathered(Image.fromarray(mask), feather)
    between = near & ~masked
    assert not feather or ((share[between] > 0) & (share[between] < 1)).any()
    assert np.abs(found - (old + (new.astype(float) - old) * share[..., None])).max() <= 0.5 + 1e-5


def test_the_feather_is_an_average_of_the_grown_mask() -> None:
    mask = spots(19, 17, 5, seed=3)
    grown, expected = np.zeros(mask.shape), np.zeros(mask.shape)
    for image, source in ((grown, mask > 0), (expected, grown)):
        for y, x in np.ndindex(*mask.shape):
            square = source[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3]
            image[y, x] = square.max() if image is grown else square.mean()
    assert np.abs(feathered(Image.fromarray(mask), 2) - expected).max() <= 1e-7
