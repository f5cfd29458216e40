"""The prompts that the judge asks with, drawn from a seed."""

from collections.abc import Sequence

import numpy as np

from .captions import plain
from .scenes import Icon, Scene, random_background, random_pair, random_single, seen_icons, seen_shapes
from .vocabulary import HELD_OUT_ICONS, HELD_OUT_SHAPES

SEEN = ("seen icons", "seen shapes", "seen pairs")
HELD_OUT = ("held-out icons", "held-out shapes", "held-out pairs")


def scenes_to_ask(each: int, seed: int = 7) -> dict[str, list[Scene]]:
    """`each` scenes of each kind in SEEN and half as many of each kind in HELD_OUT.

    Held out are combinations, such as a purple star or one style of an icon; their parts were seen in others."""
    rng = np.random.default_rng(seed)
    icons, shapes = seen_icons(), seen_shapes()
    held_icons, held_shapes = sorted(HELD_OUT_ICONS), sorted(HELD_OUT_SHAPES)
    half = max(1, each // 2)

    def some_icons(names: Sequence[tuple[str, str]], count: int) -> list[Scene]:
        order = rng.permutation(len(names))
        chosen = [names[order[place % len(names)]] for place in range(count)]
        return [Icon(name, style, random_background(rng)) for name, style in chosen]

    def pair(first: tuple[str, str]) -> Scene:
        others = [shape for shape in shapes if shape[0] != first[0]]
        return random_pair(rng, first, others[rng.integers(len(others))])

    return {
        "seen icons": some_icons(icons, each),
        "held-out icons": some_icons(held_icons, half),
        "seen shapes": [random_single(rng, *shapes[rng.integers(len(shapes))]) for _ in range(each)],
        "held-out shapes": [random_single(rng, *held_shapes[place % len(held_shapes)]) for place in range(half)],
        "seen pairs": [pair(shapes[rng.integers(len(shapes))]) for _ in range(each)],
        "held-out pairs": [pair(held_shapes[place % len(held_shapes)]) for place in range(half)],
    }


def prompts_of(scenes: Sequence[Scene]) -> list[str]:
    """A caption of each scene, in which nothing is left out."""
    return [plain(scene) for scene in scenes]
