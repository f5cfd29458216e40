"""Makes what the judge compares pictures with: every icon, cut out, on every background, and every shape's outline."""

import numpy as np
from numpy.typing import NDArray

from cascadekit.bench.judge.judge import REFERENCES, bounds, cut_out, outline
from cascadekit.bench.judge.scenes import Icon, Shape, Shapes
from cascadekit.bench.judge.vocabulary import BACKGROUNDS, OBJECTS, SHAPES, STYLES

from .render import Renderer


def write_references(renderer: Renderer) -> None:
    """Write the judge's ``references.npz``; takes four minutes."""
    icons = {background: _icons(renderer, background) for background in BACKGROUNDS}
    np.savez_compressed(REFERENCES, shapes=np.stack([_shape(renderer, shape) for shape in SHAPES]), **icons)


def _icons(renderer: Renderer, background: str) -> NDArray[np.uint8]:
    """(names, styles, CROP, CROP, 3) levels."""
    rows = [[cut_out(renderer.picture(Icon(name, style, background))) for style in STYLES] for name in OBJECTS]
    return np.round(np.array(rows) * 255).astype(np.uint8)


def _shape(renderer: Renderer, shape: str) -> NDArray[np.bool_]:
    scene = Shapes((Shape("black", shape, "large", "", (64, 64), 40.0),), "white")
    mask = renderer.picture(scene)[:, :, 0] < 128
    box = bounds(mask)
    assert box is not None
    return outline(mask, box)
