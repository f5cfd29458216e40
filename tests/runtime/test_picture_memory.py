"""The memory that a picture of any kind takes before it is scaled, measured in a process of its own."""

import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from cascadekit.runtime.images.masks import as_mask
from cascadekit.runtime.images.pictures import open_picture
from cascadekit.schemas.errors import UsageError
from cascadekit.schemas.limits import PICTURE_BYTES

SIDE = 4000
START = 60 << 20  # more than the interpreter had taken, for imports and strips
CODE = """
import resource, sys
from pathlib import Path
from cascadekit.runtime.images.masks import as_mask
from cascadekit.runtime.images.pictures import open_picture
from PIL import Image
Image.init()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sides = [int(side) for side in sys.argv[2:]]
as_mask(Path(sys.argv[1]), tuple(sides)) if sides else open_picture(Path(sys.argv[1]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def taken(path: Path, *mask_of: int) -> int:
    call = [sys.executable, "-c", CODE, str(path), *map(str, mask_of)]
    return int(subprocess.run(call, capture_output=True, text=True, check=True, env=dict(os.environ)).stdout)


def png(path: Path, width: int, height: int, depth: int, colour: int, *more: tuple[bytes, bytes]) -> Path:
    """A PNG of zeros, of any of its kinds."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = b"\0" * (1 + -(-width * depth * channels // 8))
    packed = zlib.compressobj(1)
    body = b"".join(packed.compress(row) for _ in range(height)) + packed.flush()
    head = (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    chunks = [head, *more, (b"IDAT", body), (b"IEND", b"")]
    text = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + text)
    return path


PALETTE = (b"PLTE", bytes(range(3 * 2)))
TURNED = (b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
KINDS = {
    "grey of 16 bits": (16, 0),
    "colours of 16 bits": (16, 2),
    "colours, some transparent": (8, 6),
    "16 bits, some transparent": (16, 6),
    "grey, some transparent": (8, 4),
    "a palette with transparency": (8, 3, PALETTE, (b"tRNS", b"\0\x80")),
    "one bit": (1, 0),
    "turned": (8, 2, TURNED),
}


@pytest.mark.parametrize("kind", KINDS)
def test_eight_bytes_a_pixel(tmp_path: Path, kind: str) -> None:
    depth, colour, *more = KINDS[kind]
    path = png(tmp_path / "x.png", SIDE, SIDE, depth, colour, *more)
    assert taken(path) <= 8 * SIDE * SIDE + START


@pytest.mark.parametrize("mode", ["RGBA", "I;16"])
def test_masks_take_no_more(tmp_path: Path, mode: str) -> None:
    mask = Image.new(mode, (SIDE, SIDE), (0, 0, 0, 255) if mode == "RGBA" else 65535)
    mask.putpixel((5, 5), 0 if mode == "I;16" else (0, 0, 0, 0))
    mask.save(tmp_path / "m.png", compress_level=1)
    assert taken(tmp_path / "m.png", SIDE, SIDE) <= 8 * SIDE * SIDE + START


OTHERS = {
    "progressive JPEG": ("x.jpg", {"progressive": True, "subsampling": 0}),
    "WEBP": ("x.webp", {"method": 0, "quality": 50}),
    "AVIF": ("x.avif", {"speed": 10, "quality": 50}),
    "JPEG2000": ("x.jp2", {}),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_formats_that_are_decoded_as_a_whole(tmp_path: Path, kind: str) -> None:
    """The table says what they take; a picture above the limit that follows from it is refused unread."""
    name, options = OTHERS[kind]
    if Path(name).suffix not in Image.registered_extensions():
        pytest.skip(f"this Pillow has no {kind}")
    Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB").save(tmp_path / name, **options)
    assert taken(tmp_path / name) <= PICTURE_BYTES[kind] * SIDE * SIDE + START


def test_the_limit_of_a_progressive_jpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cascadekit.runtime.images.pictures.MAX_PICTURE_BYTES", 10 * 64 * 64)
    picture = Image.new("RGB", (64, 64))
    picture.save(tmp_path / "baseline.jpg")
    picture.save(tmp_path / "progressive.jpg", progressive=True)
    assert open_picture(tmp_path / "baseline.jpg").size == (64, 64)
    with pytest.raises(UsageError, match="megapixels"):
        open_picture(tmp_path / "progressive.jpg")


def test_a_large_jpeg_is_decoded_at_half_its_size(tmp_path: Path) -> None:
    """One that is progressive, which is kept as coefficients besides."""
    wide = Image.linear_gradient("L").resize((7000, 5000)).convert("RGB")
    path = tmp_path / "x.jpg"
    wide.save(path, progressive=True, subsampling=0)
    assert taken(path) <= 8 * 7000 * 5000 + START
    found = open_picture(path)
    assert found.size == (3500, 2500)
    expected = np.asarray(wide.resize((3500, 2500), Image.Resampling.BOX), np.float32)
    assert np.abs(np.asarray(found, np.float32) - expected).mean() < 2
    small = tmp_path / "small.jpg"
    wide.crop((0, 0, 700, 400)).save(small)
    assert open_picture(small).size == (700, 400)


def test_too_large_is_said_before_it_is_decoded(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(UsageError, match="sides of at most 65535 pixels"):
        open_picture(png(tmp_path / "thin.png", 100_000, 1, 8, 0))
    Image.new("RGB", (9000, 9000)).save(tmp_path / "x.webp", method=0, lossless=True)
    with pytest.raises(UsageError, match="at most 79 megapixels"):
        open_picture(tmp_path / "x.webp")
    assert time.monotonic() - start < 30


def test_no_other_program_is_started_for_a_picture(tmp_path: Path) -> None:
    (tmp_path / "x.eps").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(UsageError, match="not a picture of a known format"):
        open_picture(tmp_path / "x.eps")


def test_only_the_first_frame_is_decoded(tmp_path: Path) -> None:
    first, *rest = (Image.new("RGB", (300, 200), (n, 0, 0)) for n in (200, 10, 20, 30))
    for name in ("x.gif", "x.webp", "x.png"):
        first.save(tmp_path / name, save_all=True, append_images=rest, lossless=True)
        red, green, blue = open_picture(tmp_path / name).getpixel((5, 5))
        assert (abs(red - 200) <= 2, green, blue) == (True, 0, 0)


def test_thin_masks(tmp_path: Path) -> None:
    """As long as a picture may be, and one pixel wide; a picture of the same shape, and one that is not."""
    long = 65_535
    cv2.imwrite(str(tmp_path / "m.png"), np.full((1, long), 255, np.uint8))
    start = time.monotonic()
    assert as_mask(tmp_path / "m.png", (long, 1)).size == (long, 1)
    assert time.monotonic() - start < 10
    with pytest.raises(UsageError, match="a mask of 65535x1 for a picture of 64x64"):
        as_mask(tmp_path / "m.png", (64, 64))


def test_a_mask_of_another_shape_is_not_decoded(tmp_path: Path) -> None:
    path = png(tmp_path / "m.png", 8000, 6000, 8, 6)
    path.write_bytes(path.read_bytes()[:200])  # its pixels are missing, which does not matter
    with pytest.raises(UsageError, match="a mask of 8000x6000 for a picture of 100x100"):
        as_mask(path, (100, 100))
