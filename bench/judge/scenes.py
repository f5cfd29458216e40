"""Scenes: what a picture shows, as data. A scene is rendered by `render`, put into words by `captions`."""

from dataclasses import dataclass

import numpy as np

from .vocabulary import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_ICONS,
    HELD_OUT_SHAPES,
    OBJECTS,
    PLACES,
    SHAPES,
    SIZES,
    STYLES,
)

PAIR_RADIUS = 26.0
TOO_FINE = ("star", "small")  # latents of 3x3 tell no small star from a small circle
RELATIONS = ("left of", "above")


@dataclass(frozen=True)
class Icon:
    """An icon in the middle of the picture; `scale` is its share of the picture's side."""

    name: str
    style: str
    background: str
    scale: float = 0.85
    shift: tuple[float, float] = (0.0, 0.0)  # pixels of a picture of 128


@dataclass(frozen=True)
class Shape:
    """A coloured shape; centre and radius in pixels of a picture of 128."""

    colour: str
    shape: str
    size: str
    place: str  # a key of PLACES, or "" in a scene of two
    centre: tuple[float, float]
    radius: float


@dataclass(frozen=True)
class Shapes:
    """One shape, or two in a relation."""

    shapes: tuple[Shape, ...]
    background: str
    relation: str = ""


Scene = Icon | Shapes


def seen_icons() -> list[tuple[str, str]]:
    return [(icon, style) for icon in OBJECTS for style in STYLES if (icon, style) not in HELD_OUT_ICONS]


def seen_shapes() -> list[tuple[str, str]]:
    return [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in HELD_OUT_SHAPES]


def random_background(rng: np.random.Generator, colours: tuple[str, ...] = ()) -> str:
    """White half of the time; never one that hides a shape of these colours."""
    names = [name for name in BACKGROUNDS if name not in colours]
    return "white" if rng.random() < 0.5 else str(rng.choice(names))


def random_icon(rng: np.random.Generator, name: str, style: str) -> Icon:
    right, down = (float(value) for value in rng.uniform(-6, 6, 2))
    return Icon(name, style, random_background(rng), float(rng.uniform(0.74, 0.92)), (right, down))


def random_single(rng: np.random.Generator, colour: str, shape: str) -> Shapes:
    sizes = [size for size in SIZES if (shape, size) != TOO_FINE]
    size, place = str(rng.choice(sizes)), str(rng.choice(list(PLACES)))
    if size == "large":
        place = "in the center"
    radius = SIZES[size] * rng.uniform(0.92, 1.08)
    reach = 60 - radius if place != "in the center" else 0
    x, y = (64 + side * reach + rng.uniform(-3, 3) for side in PLACES[place])
    made = Shape(colour, shape, size, place, (float(x), float(y)), float(radius))
    return Shapes((made,), random_background(rng, (colour,)))


def random_pair(rng: np.random.Generator, first: tuple[str, str], second: tuple[str, str]) -> Shapes:
    """Two shapes of different colours."""
    relation = str(rng.choice(RELATIONS))
    centres = ((34.0, 64.0), (94.0, 64.0)) if relation == "left of" else ((64.0, 34.0), (64.0, 94.0))
    moved = np.array(centres) + rng.uniform(-3, 3, (2, 2))
    made = tuple(
        Shape(colour, shape, "", "", (float(x), float(y)), PAIR_RADIUS)
        for (colour, shape), (x, y) in zip((first, second), moved, strict=True)
    )
    return Shapes(made, random_background(rng, (first[0], second[0])), relation)


def training_scenes(rng: np.random.Generator, icons: int, singles: int, pairs: int) -> list[Scene]:
    """`icons` pictures of each seen icon, then single shapes and pairs; never what is held out."""
    scenes: list[Scene] = [random_icon(rng, *which) for which in seen_icons() for _ in range(icons)]
    shapes = seen_shapes()
    scenes += [random_single(rng, *shapes[number % len(shapes)]) for number in range(singles)]
    for number in range(pairs):
        first = shapes[number % len(shapes)]
        others = [shape for shape in shapes if shape[0] != first[0]]
        scenes.append(random_pair(rng, first, others[rng.integers(len(others))]))
    return scenes
