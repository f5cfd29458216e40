"""Puts several images of one size onto one page, with a caption below each."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

GAP, LINE, SIZE = 8, 14, 12  # pixels: between images, of a caption's line, of its letters
LETTER = 6.5  # average width of a letter, in pixels


def contact_sheet(images: Sequence[Image.Image], captions: Sequence[str] = (), *, columns: int = 4) -> Image.Image:
    """Return a white page with `columns` images in a row; `captions` are one for each image, or none.

    Raises ValueError for another number of captions."""
    wide, high = images[0].size
    texts = [textwrap.wrap(caption, int(wide / LETTER)) for caption in captions] or [[] for _ in images]
    foot = max(map(len, texts)) * LINE + (4 if captions else 0)
    rows = -(-len(images) // columns)
    cell = (wide + GAP, high + foot + GAP)
    page = Image.new("RGB", (min(columns, len(images)) * cell[0] + GAP, rows * cell[1] + GAP), "white")
    ink, font = ImageDraw.Draw(page), ImageFont.load_default(SIZE)
    for place, (image, lines) in enumerate(zip(images, texts, strict=True)):
        x, y = GAP + place % columns * cell[0], GAP + place // columns * cell[1]
        page.paste(image, (x, y))
        for number, line in enumerate(lines):
            ink.text((x, y + high + 3 + number * LINE), line, fill="black", font=font)
    return page
