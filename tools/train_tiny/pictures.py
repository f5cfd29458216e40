"""Sheets of pictures, and curves, as PNG."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

_INKS = ("#2050e0", "#e02020", "#20a030", "#ff8c00", "#8020b0")


def sheet(path: Path, rows: Sequence[Sequence[NDArray[np.float32]]], labels: Sequence[str] = ()) -> None:
    """Rows of pictures, each (3, h, w) in 0..1, as one PNG; `labels` are written below the columns of the last row."""
    high = max(picture.shape[1] for row in rows for picture in row)
    wide = max(picture.shape[2] for row in rows for picture in row)
    gap, foot = 4, 14 if labels else 0
    size = (max(map(len, rows)) * (wide + gap), len(rows) * (high + gap) + foot)
    page = Image.new("RGB", size, "#808080")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            levels = (np.clip(picture, 0, 1).transpose(1, 2, 0) * 255 + 0.5).astype(np.uint8)
            page.paste(
                Image.fromarray(levels).resize((wide, high), Image.Resampling.NEAREST),
                (x * (wide + gap), y * (high + gap)),
            )
    ink = ImageDraw.Draw(page)
    for x, label in enumerate(labels):
        ink.text((x * (wide + gap) + 2, size[1] - foot + 1), label[: wide // 6], fill="white")
    page.save(path)


def curves(path: Path, rows: Sequence[dict[str, float]]) -> None:
    """Every value over the steps, on a logarithmic scale, smoothed."""
    names = [name for name in rows[-1] if name not in ("step", "seconds")] if rows else []
    page = Image.new("RGB", (720, 180 * len(names) + 10), "white")
    ink = ImageDraw.Draw(page)
    for place, name in enumerate(names):
        values = np.array([[row["step"], row[name]] for row in rows if row.get(name, 0) > 0])
        top = 180 * place + 20
        ink.text((6, top - 16), name, fill="black")
        if len(values) < 2:
            continue
        y = np.log10(values[:, 1])
        low, high = float(y.min()), float(np.quantile(y, 0.995)) + 1e-6
        points = [
            (
                60 + 650 * (step - values[0, 0]) / (values[-1, 0] - values[0, 0]),
                top + 140 * (1 - (v - low) / (high - low + 1e-9)),
            )
            for (step, _), v in zip(values, np.clip(y, low, high), strict=True)
        ]
        ink.line(points, fill=_INKS[place % len(_INKS)], width=1)
        for share in (0, 1):
            ink.text((4, top + 134 * (1 - share)), f"{10 ** (low + share * (high - low)):.4g}", fill="black")
        ink.text((640, top + 144), f"step {int(values[-1, 0])}", fill="black")
    page.save(path)
