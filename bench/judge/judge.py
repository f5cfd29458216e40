"""The judge: reads from the pixels alone whether a picture shows what its caption asked for.

Icons: the picture's object, cut out and brought to one size, is compared with every icon in every style on a background
of that colour. The nearest icon's name must be the one that was asked for. Shapes: the pixels of each colour are
collected; their shape, size and place must be what was asked for.

``references.npz`` holds the icons and shapes to compare with; `tools/train_tiny` makes it from the npm packages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageFilter

from .scenes import Icon, Scene, Shapes
from .vocabulary import BACKGROUNDS, COLOURS, OBJECTS, PLACES, SHAPES, SIZES, STYLES

REFERENCES = Path(__file__).with_name("references.npz")

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
Mask = NDArray[np.bool_]

CROP = 24  # side of an object that is compared
CONTRAST = 40  # levels by which an object differs from its background
LEAST_AREA = 60  # pixels of a shape
HALF_HEIGHT = 0.92  # of a shape, in radii: from 0.87 of a triangle to 1.0 of a diamond
FRINGE = 5  # pixels; what is nowhere as wide is an edge where two colours mix
LEAST_CORE = 4  # squares of FRINGE pixels that a thing holds
SAME_SHAPE = 0.55  # least overlap with the shape it is taken for


@dataclass(frozen=True)
class Judgement:
    """Whether all is right, and each property by itself."""

    parts: dict[str, bool]
    seen: str  # what the judge sees, in words

    @property
    def right(self) -> bool:
        return all(self.parts.values())


def judge(picture: U8, scene: Scene) -> Judgement:
    """Judge `picture` (h, w, 3)."""
    small = np.asarray(Image.fromarray(picture).resize((128, 128), Image.Resampling.BOX))
    return _icon(small, scene) if isinstance(scene, Icon) else _shapes(small, scene)


def has_style(picture: U8, scene: Icon) -> bool:
    """Whether the object's style, among those of its own name, is the one that was asked for."""
    rows = _icons(nearest_background(picture))[list(OBJECTS).index(scene.name)]
    nearest = np.square(rows - cut_out(picture)).mean(axis=(1, 2, 3)).argmin()
    return bool(nearest == list(STYLES).index(scene.style))


def nearest_icon(picture: U8, background: str) -> tuple[str, str]:
    """The name and the style of the icon that looks most like the picture's object."""
    distances = np.square(_icons(background) - cut_out(picture)).mean(axis=(2, 3, 4))
    name, style = np.unravel_index(distances.argmin(), distances.shape)
    return list(OBJECTS)[name], list(STYLES)[style]


def nearest_name_by_lightness(picture: U8) -> str:
    """The name of the icon that looks most like the picture's object when neither colour nor contrast counts."""
    distances = np.square(_lightness(_icons(nearest_background(picture))) - _lightness(cut_out(picture))).mean(
        axis=(2, 3)
    )
    return list(OBJECTS)[int(distances.min(axis=1).argmin())]


def _lightness(levels: F32) -> F32:
    """Levels (..., h, w, 3) to lightness (..., h, w) of mean 0 and deviation 1."""
    light = levels.mean(axis=-1)
    light = light - light.mean(axis=(-2, -1), keepdims=True)
    made: F32 = light / (light.std(axis=(-2, -1), keepdims=True) + 1e-3)
    return made


def _icon(picture: U8, scene: Icon) -> Judgement:
    background = nearest_background(picture)
    name, style = nearest_icon(picture, background)
    parts = {"name": name == scene.name, "background": background == scene.background}
    return Judgement(parts, f"{OBJECTS[name][0]}, {style} style on {background}")


@cache
def _icons(background: str) -> F32:
    """The objects of all icons on that background, as `cut_out` returns them: (names, styles, CROP, CROP, 3)."""
    found: F32 = np.load(REFERENCES)[background].astype(np.float32) / 255
    return found


def border(picture: U8) -> NDArray[np.float64]:
    """The median colour along the border."""
    edge = np.concatenate(
        [
            picture[:3].reshape(-1, 3),
            picture[-3:].reshape(-1, 3),
            picture[:, :3].reshape(-1, 3),
            picture[:, -3:].reshape(-1, 3),
        ]
    )
    found: NDArray[np.float64] = np.median(edge, axis=0)
    return found


def nearest_background(picture: U8) -> str:
    colours = np.array([ImageColor.getrgb(colour) for colour in BACKGROUNDS.values()], np.float64)
    return list(BACKGROUNDS)[int(np.square(colours - border(picture)).sum(axis=1).argmin())]


def cut_out(picture: U8) -> F32:
    """The object, which differs from the border's colour, in a square of CROP pixels, in 0..1."""
    differs = np.abs(picture.astype(np.float64) - border(picture)).max(axis=2) > CONTRAST
    box = bounds(differs) or (0, 0, picture.shape[1], picture.shape[0])
    side = max(box[2] - box[0], box[3] - box[1]) + 4
    x, y = (box[0] + box[2] - side) / 2, (box[1] + box[3] - side) / 2
    page = Image.new("RGB", (3 * picture.shape[1], 3 * picture.shape[0]), tuple(int(v) for v in border(picture)))
    page.paste(Image.fromarray(picture), (picture.shape[1], picture.shape[0]))
    left, top = x + picture.shape[1], y + picture.shape[0]
    cut = page.resize((CROP, CROP), Image.Resampling.BOX, box=(left, top, left + side, top + side))
    levels: F32 = np.asarray(cut, dtype=np.float32) / np.float32(255)
    return levels


def bounds(mask: Mask) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom of the mask, without its outermost hundredth, where stray pixels are."""
    ys, xs = np.nonzero(mask)
    if len(xs) < 20:
        return None
    left, right = np.quantile(xs, [0.004, 0.996])
    top, bottom = np.quantile(ys, [0.004, 0.996])
    return int(left), int(top), int(right) + 1, int(bottom) + 1


def _shapes(picture: U8, scene: Shapes) -> Judgement:
    masks = colour_masks(picture)
    parts = {"background": nearest_background(picture) == scene.background}
    found = [masks.get(shape.colour) for shape in scene.shapes]
    asked = {shape.colour for shape in scene.shapes}
    parts["colours"] = asked <= masks.keys() and not any(is_solid(masks[colour]) for colour in masks.keys() - asked)
    seen = ", ".join(f"{colour} {shape_of(mask)}" for colour, mask in masks.items()) or "nothing"
    if any(mask is None for mask in found):
        return Judgement({**parts, "shapes": False}, seen)
    whole = [mask for mask in found if mask is not None]
    parts["shapes"] = all(shape_of(mask) == shape.shape for mask, shape in zip(whole, scene.shapes, strict=True))
    parts["places"] = _placed(whole, scene)
    return Judgement(parts, f"{seen} on {nearest_background(picture)}")


def _placed(masks: Sequence[Mask], scene: Shapes) -> bool:
    centres = [_centre(mask) for mask in masks]
    if len(centres) == 2:
        along, across = (0, 1) if scene.relation == "left of" else (1, 0)
        apart = centres[1] - centres[0]
        return bool(apart[along] > 20 and abs(apart[across]) < 25)
    (shape,) = scene.shapes
    box = bounds(masks[0])
    assert box is not None
    sizes = np.array(list(SIZES.values()))
    reached = (box[3] - box[1]) / 2 / HALF_HEIGHT
    nearest = list(SIZES)[int(np.abs(np.log(sizes / reached)).argmin())]
    return nearest == shape.size and all(
        abs(value - 64) < 16 if side == 0 else side * (value - 64) > 10
        for value, side in zip(_middle(box), PLACES[shape.place], strict=True)
    )


def colour_masks(picture: U8) -> dict[str, Mask]:
    """The pixels of each colour that has enough of them: those nearer to it than to any other or the background."""
    back = border(picture)
    names = [name for name in COLOURS if np.square(ImageColor.getrgb(COLOURS[name]) - back).sum() > 60**2]
    palette = np.array([ImageColor.getrgb(COLOURS[name]) for name in names] + [tuple(back)], np.float64)
    distances = np.square(picture[:, :, None].astype(np.float64) - palette).sum(axis=3)
    nearest = distances.argmin(axis=2)
    certain = distances.min(axis=2) < 80**2
    masks = {name: _opened((nearest == index) & certain) for index, name in enumerate(names)}
    return {name: mask for name, mask in masks.items() if mask.sum() >= LEAST_AREA}


def is_solid(mask: Mask) -> bool:
    """Whether the mask is a thing of its own. The edge between red and blue is purple, three or four pixels wide."""
    core = np.asarray(Image.fromarray(mask.astype(np.uint8)).filter(ImageFilter.MinFilter(FRINGE)))
    return bool(core.sum() >= LEAST_CORE)


def _opened(mask: Mask) -> Mask:
    """The mask without its thin parts: along edges colours mix and pass for others."""
    core = mask.copy()
    for axis in (0, 1):
        for step in (-1, 1):
            core &= np.roll(mask, step, axis)
    grown = core.copy()
    for axis in (0, 1):
        for step in (-2, -1, 1, 2):
            grown |= np.roll(grown if axis else core, step, axis)
    return grown & mask


def shape_of(mask: Mask) -> str:
    """The name of the shape whose outline fits the mask best."""
    box = bounds(mask)
    if box is None:
        return "speck"
    cut = outline(mask, box)
    overlaps = {name: (cut & other).sum() / (cut | other).sum() for name, other in _templates().items()}
    best = max(overlaps, key=lambda name: overlaps[name])
    return best if overlaps[best] >= SAME_SHAPE else "blob"


@cache
def _templates() -> dict[str, Mask]:
    """The outline of each shape, in a square of 32 pixels."""
    return dict(zip(SHAPES, np.load(REFERENCES)["shapes"], strict=True))


def outline(mask: Mask, box: tuple[int, int, int, int]) -> Mask:
    """The part of the mask in `box` (left, top, right, bottom), in a square of 32 pixels."""
    return np.asarray(Image.fromarray(mask).crop(box).resize((32, 32), Image.Resampling.BOX)).astype(bool)


def _centre(mask: Mask) -> NDArray[np.float64]:
    ys, xs = np.nonzero(mask)
    return np.array([xs.mean(), ys.mean()])


def _middle(box: tuple[int, int, int, int]) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
