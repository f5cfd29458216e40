"""The two final images of a parity report, and their difference made visible."""

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .figures import figure, spaced

SMALL = 512  # narrower images are shown with their pixels as squares

Array = NDArray[Any]


@dataclass(frozen=True)
class InlineImage:
    """An image inside the page: `source` is a lossless PNG as a data URL."""

    source: str
    width: int
    height: int

    @property
    def small(self) -> bool:
        return self.width < SMALL


@dataclass(frozen=True)
class ComparedImages:
    """The images and their amplified difference. `text` describes the difference, `changed` counts its pixels."""

    found: InlineImage
    expected: InlineImage
    difference: InlineImage
    text: str
    changed: str


def compared_images(found: Array, expected: Array) -> ComparedImages:
    """The first image of both batches, (B, 3, height, width) in 0..1."""
    ours, theirs = (np.nan_to_num(batch[0].astype(np.float64)) for batch in (found, expected))  # (3, height, width)
    error = np.abs(ours - theirs)
    largest = float(error.max())
    factor = amplification(largest)
    text = f"Difference × {spaced(factor)}; the largest is {figure(largest)} of 1"
    if largest == 0:
        text = "Difference: none, the images are equal to the bit"
    changed = int(np.count_nonzero((error * 255).round().max(axis=0)))
    words = f"{spaced(changed)} of {spaced(error[0].size)} pixels differ by more than half a step of 8 bits."
    return ComparedImages(_inline(ours), _inline(theirs), _inline(error * factor), text, changed=words)


def amplification(largest: float) -> int:
    """The largest power of two that leaves `largest` within 0..1; 1 when nothing differs."""
    return 1 << max(0, int(np.floor(-np.log2(largest)))) if 0 < largest <= 1 else 1


def _inline(planes: Array) -> InlineImage:
    """(3, height, width) in 0..1 as a lossless PNG."""
    pixels = (np.clip(planes, 0, 1).transpose(1, 2, 0) * 255).round().astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
    return InlineImage(source, width=pixels.shape[1], height=pixels.shape[0])
