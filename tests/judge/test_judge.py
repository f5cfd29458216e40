"""The judge itself: on shapes that Pillow draws, and on icons that resvg rendered from the npm packages.

The icons in data/ are 12 of the held-out ones, moved and smaller than the references. Their names hold name, style and
background.
"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from cascadekit.bench.judge.judge import has_style, judge
from cascadekit.bench.judge.scenes import Icon, Shape, Shapes
from cascadekit.bench.judge.vocabulary import BACKGROUNDS, COLOURS, OBJECTS

DATA = Path(__file__).with_name("data")
ICONS = sorted(DATA.glob("*.png"))


def draw(*shapes: tuple[str, str, tuple[int, int], int], background: str = "white") -> Image.Image:
    """Shapes as (colour, shape, centre, half height), drawn by Pillow at four times the size."""
    page = Image.new("RGB", (512, 512), BACKGROUNDS[background])
    ink = ImageDraw.Draw(page)
    for colour, shape, (x, y), half in shapes:
        x, y, r = 4 * x, 4 * y, 4 * half
        points = {
            "circle": None,
            "square": [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)],
            "triangle": [(x, y - r), (x + r, y + r), (x - r, y + r)],
            "diamond": [(x, y - r), (x + 0.75 * r, y), (x, y + r), (x - 0.75 * r, y)],
        }[shape]
        if points is None:
            ink.ellipse((x - r, y - r, x + r, y + r), fill=COLOURS[colour])
        else:
            ink.polygon(points, fill=COLOURS[colour])
    return page.resize((128, 128), Image.Resampling.BOX)


def single(colour: str, shape: str, size: str, place: str, background: str = "white") -> Shapes:
    return Shapes((Shape(colour, shape, size, place, (64.0, 64.0), 25.0),), background)


def pair(first: tuple[str, str], relation: str, second: tuple[str, str]) -> Shapes:
    one, other = (Shape(*each, "", "", (64.0, 64.0), 24.0) for each in (first, second))
    return Shapes((one, other), "white", relation)


@pytest.mark.parametrize("shape", ["circle", "square", "triangle", "diamond"])
@pytest.mark.parametrize("colour", list(COLOURS))
def test_single_shapes(colour: str, shape: str) -> None:
    picture = np.asarray(draw((colour, shape, (64, 64), 25)))
    assert judge(picture, single(colour, shape, "", "in the center")).right
    others = [
        single("red" if colour != "red" else "blue", shape, "", "in the center"),
        single(colour, "star", "", "in the center"),
        single(colour, shape, "large", "in the center"),
        single(colour, shape, "", "on the left"),
        single(colour, shape, "", "in the center", "light blue"),
    ]
    assert not any(judge(picture, other).right for other in others)


@pytest.mark.parametrize(("relation", "places"), [("left of", ((34, 64), (94, 64))), ("above", ((64, 34), (64, 94)))])
def test_pairs(relation: str, places: tuple[tuple[int, int], tuple[int, int]]) -> None:
    picture = np.asarray(draw(("red", "circle", places[0], 24), ("blue", "square", places[1], 24)))
    assert judge(picture, pair(("red", "circle"), relation, ("blue", "square"))).right
    for wrong in (
        pair(("blue", "square"), relation, ("red", "circle")),  # the other way round
        pair(("blue", "circle"), relation, ("red", "square")),  # colours exchanged
        pair(("red", "circle"), "above" if relation == "left of" else "left of", ("blue", "square")),
        pair(("red", "circle"), relation, ("green", "square")),
        single("red", "circle", "", "on the left"),  # a shape too many
    ):
        assert not judge(picture, wrong).right


def test_a_blurred_edge_is_no_shape_but_a_small_one_is() -> None:
    """Between a red and a blue shape that touch, the edge is purple, and orange between red and yellow."""
    for colours in (("red", "blue"), ("red", "yellow")):
        page = draw((colours[0], "square", (40, 64), 26), (colours[1], "square", (92, 64), 26))
        scene = pair((colours[0], "square"), "left of", (colours[1], "square"))
        assert judge(np.asarray(page.filter(ImageFilter.GaussianBlur(1.5))), scene).right
        ImageDraw.Draw(page).rectangle((60, 100, 69, 109), fill=COLOURS["green"])
        assert not judge(np.asarray(page), scene).right


@pytest.mark.parametrize("path", ICONS, ids=lambda path: path.stem)
@pytest.mark.parametrize("changed", ["as it is", "moved", "smaller", "blurred", "noisy"])
def test_icons(path: Path, changed: str) -> None:
    name, style, background = path.stem.split("_")
    picture = Image.open(path).convert("RGB")
    if changed == "moved":
        picture = picture.transform(
            picture.size, Image.Transform.AFFINE, (1, 0, 5, 0, 1, -4), fillcolor=BACKGROUNDS[background]
        )
    if changed == "smaller":
        page = Image.new("RGB", picture.size, BACKGROUNDS[background])
        page.paste(picture.resize((110, 110), Image.Resampling.BOX), (9, 9))
        picture = page
    if changed == "blurred":
        picture = picture.filter(ImageFilter.GaussianBlur(2))
    levels = np.asarray(picture)
    if changed == "noisy":
        noise = np.random.default_rng(0).normal(0, 12, levels.shape)
        levels = np.clip(levels + noise, 0, 255).astype(np.uint8)
    assert judge(levels, Icon(name, style, background)).right
    assert changed in ("blurred", "noisy") or has_style(levels, Icon(name, style, background))
    wrong = list(OBJECTS)[(list(OBJECTS).index(name) + 1) % len(OBJECTS)]
    assert not judge(levels, Icon(wrong, style, background)).right


@pytest.mark.parametrize("level", [0, 128, 255])
def test_an_empty_picture_is_never_right(level: int) -> None:
    empty = np.full((128, 128, 3), level, np.uint8)
    assert not judge(empty, single("red", "circle", "", "in the center")).right
    assert sum(judge(empty, Icon(name, "flat", "white")).right for name in OBJECTS) <= 1
