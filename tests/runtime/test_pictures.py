"""Picture files to arrays: against transformers' image processor on Pillow, and formulas written by hand."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from cascadekit.parity.reference import load_reference
from cascadekit.runtime.images.pictures import as_picture, clip_pixels, effnet_input, fit, fitted_pixels, open_picture
from cascadekit.schemas.errors import UsageError
from helpers.efficientnets import narrow_effnet
from helpers.graphs import random_tensors

Array = np.ndarray


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> Array:
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def saved(picture: Image.Image, path: Path, **options: Any) -> Path:
    picture.save(path, **options)
    return path


ORIENTED: dict[int, Callable[[Array], Array]] = {  # from what is stored to what is seen, after the EXIF standard
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a[::-1].transpose(1, 0, 2),  # the first row is at the right
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a[:, ::-1].transpose(1, 0, 2),  # the first column is at the bottom
}


@pytest.mark.parametrize("orientation", ORIENTED)
def test_turned_as_exif_says(tmp_path: Path, orientation: int) -> None:
    stored = noise(5, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(Image.fromarray(stored), tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(open_picture(path)), ORIENTED[orientation](stored))


def over_white(colours: Array, alpha: Array) -> Array:
    share = alpha[..., None] / 255
    return colours * share + 255 * (1 - share)


def test_what_is_transparent_lets_white_through(tmp_path: Path) -> None:
    rgba, la = noise(9, 7, 4), noise(9, 7, 2)
    seen = np.asarray(open_picture(saved(Image.fromarray(rgba), tmp_path / "rgba.png")), np.float64)
    assert np.abs(seen - over_white(rgba[..., :3], rgba[..., 3])).max() <= 1
    seen = np.asarray(open_picture(saved(Image.fromarray(la, "LA"), tmp_path / "la.png")), np.float64)
    assert np.abs(seen - over_white(la[..., :1].repeat(3, -1), la[..., 1])).max() <= 1
    palette = Image.fromarray(noise(9, 7, 1) % 3, "P")
    palette.putpalette([10, 20, 30, 200, 0, 100, 7, 8, 9])
    path = saved(palette, tmp_path / "p.png", transparency=bytes([255, 0, 51]))
    table = np.array([[10, 20, 30], [255, 255, 255], [205, 206, 206]])  # 0.2 of (7, 8, 9) and 0.8 of white
    assert np.abs(np.asarray(open_picture(path), int) - table[np.asarray(palette)]).max() <= 1


def test_other_depths_and_modes(tmp_path: Path) -> None:
    grey = np.random.default_rng(1).integers(0, 1 << 16, (6, 5), dtype=np.uint16)
    cv2.imwrite(str(tmp_path / "grey16.png"), grey)
    seen = np.asarray(open_picture(tmp_path / "grey16.png"))
    assert seen.shape == (6, 5, 3)
    assert np.abs(seen - grey[..., None] / 257).max() <= 0.5 + 1e-9
    colour = np.random.default_rng(2).integers(0, 1 << 16, (6, 5, 3), dtype=np.uint16)
    cv2.imwrite(str(tmp_path / "rgb16.png"), colour[..., ::-1])
    assert np.abs(np.asarray(open_picture(tmp_path / "rgb16.png")) - colour / 257).max() <= 1
    bits = noise(9, 7, 1) > 127
    seen = np.asarray(open_picture(saved(Image.fromarray(bits), tmp_path / "bits.png")))
    assert np.array_equal(seen, (bits[..., None] * 255).repeat(3, -1))
    inks = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    (red, green, blue) = open_picture(saved(inks, tmp_path / "inks.tiff")).getpixel((3, 3))
    assert (red, green, blue) == (0, 255, 255)


def png_of(width: int, height: int) -> bytes:
    """A PNG that says it is of that size, and holds nothing."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def test_what_is_no_picture(tmp_path: Path) -> None:
    def refused(name: str, words: str, content: bytes | None = None) -> None:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UsageError, match=words) as raised:
            open_picture(path)
        assert str(raised.value).startswith(f"{path}: ")
        assert "\n" not in str(raised.value)

    (tmp_path / "folder").mkdir()
    refused("absent.png", "found no such file")
    refused("folder", "found a folder")
    refused("text.png", "not a picture of a known format", b"a text, not a picture")
    refused("empty.png", "not a picture of a known format", b"")
    refused("bomb.png", "at most 178 megapixels", png_of(20_000, 20_000))
    whole = saved(Image.fromarray(noise(200, 150)), tmp_path / "whole.jpg").read_bytes()
    refused("cut.jpg", "cannot be decoded: .*truncated", whole[: len(whole) // 2])
    whole = saved(Image.fromarray(noise(200, 150)), tmp_path / "whole.png").read_bytes()
    refused("cut.png", "cannot be decoded", whole[: len(whole) // 2])
    refused("hollow.png", "cannot be decoded", png_of(20, 20))
    floats = Image.fromarray(np.ones((4, 4), np.float32))
    refused("floats.tiff", "a picture of floats", saved(floats, tmp_path / "f.tiff").read_bytes())
    with pytest.raises(UsageError, match="picture: a picture of floats"):
        as_picture(floats)
    wide = Image.fromarray(np.full((4, 4), 70_000, np.int32))
    refused("wide.tiff", "32-bit integers", saved(wide, tmp_path / "w.tiff").read_bytes())


SIZES = [(224, 224), (301, 455), (455, 301), (37, 41), (225, 223), (3, 500), (700, 5)]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_clip_pixels_are_those_of_transformers(tmp_path: Path, mode: str) -> None:
    processor = CLIPImageProcessorPil()
    pictures = [Image.fromarray(noise(*size, 4, seed)).convert(mode) for seed, size in enumerate(SIZES)]
    paths = [saved(picture, tmp_path / f"{number}.png") for number, picture in enumerate(pictures)]
    ours = clip_pixels([open_picture(path) for path in paths])
    theirs = processor([Image.open(path) for path in paths], return_tensors="np")["pixel_values"]
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape == (len(SIZES), 3, 224, 224)
    assert np.abs(ours - theirs).max() <= 1e-6


def test_clip_pixels_of_another_size() -> None:
    processor = CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30})
    picture = Image.fromarray(noise(77, 50))
    ours, theirs = clip_pixels([picture], 30), processor([picture], return_tensors="np")["pixel_values"]
    assert np.abs(ours - theirs).max() <= 1e-6
    with pytest.raises(UsageError, match=r"of 1x501: expected sides that differ 500-fold at most"):
        clip_pixels([Image.new("RGB", (1, 501))])


@pytest.mark.parametrize("size", [(640, 480), (91, 300), (64, 48), (1000, 31)])
def test_fitting_covers_and_keeps_the_middle(size: tuple[int, int]) -> None:
    picture = Image.fromarray(noise(*size))
    fitted = fit(picture, 64, 48)
    theirs = ImageOps.fit(picture, (64, 48), Image.Resampling.LANCZOS)
    assert fitted.size == (64, 48)
    assert np.abs(np.asarray(fitted, int) - np.asarray(theirs, int)).max() <= 1
    if size == (64, 48):
        assert np.array_equal(np.asarray(fitted), np.asarray(picture))


def test_the_effnet_map_has_the_size_of_the_priors_latents() -> None:
    pixels = effnet_input(Image.fromarray(noise(700, 333)), (5, 3))
    assert pixels.shape == (1, 3, 160, 96)
    config = narrow_effnet()
    encoder = load_reference(config, random_tensors(config, 0))
    with torch.no_grad():
        assert encoder(pixels=torch.from_numpy(pixels))["effnet"].shape == (1, 16, 5, 3)
    exact = noise(96, 160)  # ImageNet's mean and deviation, as torchvision documents them
    expected = (exact / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    found = effnet_input(Image.fromarray(exact), (5, 3))
    assert found.dtype == np.float32
    assert np.abs(found[0] - expected.transpose(2, 0, 1)).max() <= 1e-6


def test_the_vqgan_takes_pixels_from_0_to_1() -> None:
    exact = noise(24, 16)
    found = fitted_pixels(Image.fromarray(exact), 16, 24)
    assert found.dtype == np.float32
    assert np.array_equal(found, torch.from_numpy(exact).permute(2, 0, 1)[None].float().div(255).numpy())
    assert fitted_pixels(Image.fromarray(exact), 40, 8).shape == (1, 3, 40, 8)
