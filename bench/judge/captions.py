"""Puts a scene into words, in one of many ways."""

import numpy as np

from .scenes import Icon, Scene, Shape, Shapes
from .vocabulary import OBJECTS

_PLURALS = (
    "cherries",
    "two cherries",
    "grapes",
    "bread",
    "cheese",
    "lightning",
    "fire",
    "broccoli",
    "coffee",
    "beer",
    "wine",
)
_PICTURE = ("", "", "", "a picture of ", "an icon of ", "an image of ", "a drawing of ")


def article(words: str) -> str:
    if words in _PLURALS:
        return words
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One caption of the scene."""
    words = _icon(scene, rng) if isinstance(scene, Icon) else _shapes(scene, rng)
    white = scene.background == "white"
    told = rng.random() < (0.15 if white else 0.9)
    return f"{words} on {article(scene.background)} background" if told else words


def plain(scene: Scene) -> str:
    """The caption the judge asks with: nothing left out."""
    rng = np.random.default_rng(0)
    words = _plain_icon(scene) if isinstance(scene, Icon) else _shapes(scene, rng, plain=True)
    return words if scene.background == "white" else f"{words} on {article(scene.background)} background"


def _plain_icon(scene: Icon) -> str:
    return f"{article(OBJECTS[scene.name][0])}, {scene.style} style"


def _icon(scene: Icon, rng: np.random.Generator) -> str:
    names = OBJECTS[scene.name]
    name = names[0] if rng.random() < 0.6 else str(rng.choice(names))
    if rng.random() >= 0.75:
        return f"{rng.choice(_PICTURE)}{article(name) if rng.random() < 0.8 else name}"
    form = rng.integers(4)
    if form == 0:
        return f"a {scene.style} icon of {article(name)}"
    if form == 1:
        return f"{article(name)} in {scene.style} style"
    return f"{rng.choice(_PICTURE)}{article(name)}, {scene.style} style"


def _shapes(scene: Shapes, rng: np.random.Generator, *, plain: bool = False) -> str:
    shown = "" if plain else str(rng.choice(_PICTURE))
    if len(scene.shapes) == 1:
        (only,) = scene.shapes
        place = f" {only.place}"
        if only.place == "in the center" and not plain and rng.random() < 0.6:
            place = ""
        return f"{shown}{_shape(only)}{place}"
    first, second = (_shape(shape) for shape in scene.shapes)
    if scene.relation == "left of":
        forms = [f"{first} left of {second}", f"{second} right of {first}", f"{first} and {second}"]
    else:
        forms = [f"{first} above {second}", f"{second} below {first}"]
    return shown + (forms[0] if plain else str(rng.choice(forms)))


def _shape(shape: Shape) -> str:
    return article(" ".join(word for word in (shape.size, shape.colour, shape.shape) if word))
