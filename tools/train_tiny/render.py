"""Renders scenes with resvg. The icons come from npm packages of Iconify, see README.md for their licences."""

import io
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from numpy.typing import NDArray
from PIL import Image

from cascadekit.bench.judge.scenes import Icon, Scene, Shape
from cascadekit.bench.judge.vocabulary import BACKGROUNDS, COLOURS, STYLES

SIDE = 128
U8 = NDArray[np.uint8]


# The colours of a cyanotype, a photographic print in Prussian blue: where the picture is black and where it is white.
CYANOTYPE = (np.array([12.0, 40.0, 100.0]), np.array([238.0, 246.0, 250.0]))


class Renderer:
    """Renders scenes from the icon packages below `packages`, the node_modules folder."""

    def __init__(self, packages: Path) -> None:
        self.packages = packages

    @cache  # noqa: B019 - one renderer lives as long as the program
    def package(self, style: str) -> dict[str, Any]:
        path = self.packages / "@iconify-json" / STYLES[style] / "icons.json"
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def picture(self, scene: Scene, side: int = SIDE) -> U8:
        """The scene as (side, side, 3) RGB."""
        body = self._icon(scene) if isinstance(scene, Icon) else "".join(map(_drawn, scene.shapes[::-1]))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 128 128" width="{side}" height="{side}" color="#101014">'
            f'<rect width="128" height="128" fill="{BACKGROUNDS[scene.background]}"/>{body}</svg>'
        )
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg))
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))

    def _icon(self, scene: Icon) -> str:
        package = self.package(scene.style)
        icon = package["icons"][scene.name]
        width, height = (icon.get(side, package.get(side, 16)) for side in ("width", "height"))
        size = 128 * scene.scale
        x, y = ((128 - size) / 2 + shift for shift in scene.shift)
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        return f'<svg x="{x}" y="{y}" width="{size}" height="{size}" viewBox="{box}">{icon["body"]}</svg>'


def cyanotype(picture: U8) -> U8:
    """The same picture (h, w, 3) as a cyanotype: only its lightness is left, from deep blue to white."""
    light = np.asarray(Image.fromarray(picture).convert("L"))[:, :, None] / 255
    dark, white = CYANOTYPE
    printed: U8 = (dark + light * (white - dark)).round().astype(np.uint8)
    return printed


def _drawn(shape: Shape) -> str:
    (x, y), r, fill = shape.centre, shape.radius, f'fill="{COLOURS[shape.colour]}"'
    match shape.shape:
        case "circle":
            return f'<circle cx="{x}" cy="{y}" r="{r}" {fill}/>'
        case "square":
            side = 0.9 * r
            return f'<rect x="{x - side}" y="{y - side}" width="{2 * side}" height="{2 * side}" {fill}/>'
        case "triangle":
            points = [(x, y - r), (x + 1.05 * r, y + 0.85 * r), (x - 1.05 * r, y + 0.85 * r)]
        case "diamond":
            points = [(x, y - 1.1 * r), (x + 0.8 * r, y), (x, y + 1.1 * r), (x - 0.8 * r, y)]
        case "star":
            points = [_polar(x, y + 0.08 * r, r * (1.1 if i % 2 == 0 else 0.45), i * math.pi / 5) for i in range(10)]
        case _:  # heart
            return (
                f'<path d="M{x} {y + r} C{x - 1.7 * r} {y - 0.1 * r} {x - 0.9 * r} {y - 1.5 * r} {x} {y - 0.45 * r} '
                f'C{x + 0.9 * r} {y - 1.5 * r} {x + 1.7 * r} {y - 0.1 * r} {x} {y + r}Z" {fill}/>'
            )
    return f'<polygon points="{" ".join(f"{px:.2f},{py:.2f}" for px, py in points)}" {fill}/>'


def _polar(x: float, y: float, radius: float, angle: float) -> tuple[float, float]:
    return x + radius * math.sin(angle), y - radius * math.cos(angle)
