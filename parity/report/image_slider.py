"""The two final images of a parity report: a slider between them, and their difference made visible."""

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...schemas.report import ParityReport
from .markup import Markup, element, join
from .svg import figure, spaced

SMALL = 512  # narrower images are shown with their pixels as squares

Array = NDArray[Any]


def image_section(report: ParityReport, images: tuple[Array, Array] | None) -> Markup | None:
    """None without images. Of a batch the first is shown."""
    if images is None:
        return None
    found, expected = (image[0].astype(np.float64) for image in images)  # (3, height, width)
    size = f"{found.shape[2]} × {found.shape[1]}"
    return join(
        element("h2", "Final image"),
        element("p", f"{size} pixels, from the same noise, step for step.", class_="quiet"),
        element("div", _slider(report, found, expected), _difference(found, expected), class_="images"),
    )


def _slider(report: ParityReport, found: Array, expected: Array) -> Markup:
    return element(
        "figure",
        element(
            "div",
            _picture(found, f"The image drawn by {report.engine}"),
            _picture(expected, f"The image drawn by {report.reference}"),
            class_="stack",
        ),
        element(
            "input",
            type="range",
            min=0,
            max=100,
            value=50,
            aria_label=f"How much of the image by {report.engine} is shown, from the left, in percent",
        ),
        element("div", element("span", f"◀ {report.engine}"), element("span", f"{report.reference} ▶"), class_="ends"),
        class_="compare",
    )


def _difference(found: Array, expected: Array) -> Markup:
    error = np.abs(np.nan_to_num(found) - np.nan_to_num(expected))
    largest = float(error.max())
    factor = amplification(largest)
    text = f"Difference × {spaced(factor)}; the largest is {figure(largest)} of 1"
    if largest == 0:
        text = "Difference: none, the images are equal to the bit"
    return element(
        "figure",
        _picture(error * factor, text),
        element("figcaption", f"{text}. {_where(error)}"),
    )


def amplification(largest: float) -> int:
    """The largest power of two that leaves `largest` within 0..1; 1 when nothing differs."""
    return 1 << max(0, int(np.floor(-np.log2(largest)))) if 0 < largest <= 1 else 1


def _where(error: Array) -> str:
    changed = int(np.count_nonzero((error * 255).round().max(axis=0)))
    return f"{spaced(changed)} of {spaced(error[0].size)} pixels differ by more than half a step of 8 bits."


def _picture(planes: Array, text: str) -> Markup:
    """(3, height, width) in 0..1 as an image inside the page, a lossless PNG."""
    pixels = (np.clip(np.nan_to_num(planes), 0, 1).transpose(1, 2, 0) * 255).round().astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", optimize=True)
    height, width = pixels.shape[:2]
    return element(
        "img",
        src="data:image/png;base64," + base64.b64encode(content.getvalue()).decode(),
        alt=text,
        width=width,
        height=height,
        class_="small" if width < SMALL else None,
    )
