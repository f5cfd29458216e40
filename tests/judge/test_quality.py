"""What the example model generates, through ONNX Runtime, as the judge sees it.

The limits lie below what was measured over many more pictures (docs/quality.md), by about three standard deviations of
the pictures that are asked for here.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cascadekit import Cascade, export
from cascadekit.bench.judge.judge import has_style, nearest_background, nearest_icon
from cascadekit.bench.judge.prompts import HELD_OUT, SEEN, prompts_of, scenes_to_ask
from cascadekit.bench.judge.scenes import Icon, Scene
from cascadekit.bench.judge.vocabulary import OBJECTS, STYLES
from cascadekit.bench.quality import generated, judge_cascade
from cascadekit.converters.checkpoints.example_model import EXAMPLE_MODEL
from cascadekit.runtime.sampling.controlnets import ControlPicture, FilterInputs, canny

SEEN_SHARE, HELD_OUT_SHARE = 0.5, 0.3  # TO BE SET
ICONS = [Icon(name, style, "white") for name, style in (("red-apple", "flat"), ("rocket", "classic"), ("frog", "glossy"))]

Levels = np.ndarray[Any, np.dtype[np.uint8]]


def name_of(image: Image.Image) -> str:
    levels = np.asarray(image)
    return nearest_icon(levels, nearest_background(levels))[0]


def names(cascade: Cascade, prompts: list[str], **settings: Any) -> list[str]:
    return [name_of(image) for image in cascade.generate(prompts, seed=0, **settings).images]


@pytest.fixture(scope="module")
def icons() -> list[Scene]:
    """Twelve icons on white, four in each style."""
    chosen = list(OBJECTS)[::9][:12]
    return [Icon(name, list(STYLES)[place % 3], "white") for place, name in enumerate(chosen)]


def test_most_prompts_are_right(cascade: Cascade) -> None:
    shares = judge_cascade(cascade, scenes_to_ask(16))
    assert shares.share(SEEN) >= SEEN_SHARE, shares.wrong
    assert shares.share(HELD_OUT) >= HELD_OUT_SHARE, shares.wrong


def test_guidance_raises_the_share(cascade: Cascade) -> None:
    asked = scenes_to_ask(12)
    without, default = (judge_cascade(cascade, asked, prior_guidance=value).share(SEEN) for value in (1.0, 4.0))
    assert default > without
