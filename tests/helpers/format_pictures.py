"""Pictures of the example model from files of any format: ours, and what is recorded of a foreign program's."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cascadekit import Cascade, convert, export
from cascadekit.bench.judge.judge import judge
from cascadekit.bench.judge.scenes import Icon
from cascadekit.parity.image_metrics import psnr
from helpers.matrix import Matrix
from helpers.stability_pictures import STABILITY

SCENES = (Icon("strawberry", "glossy", "white"), Icon("fox", "flat", "white"))
PROMPTS = [f"a {scene.name}, {scene.style} style" for scene in SCENES]
SEED = 11
# dB of two readings of the same file. Where values are rounded between layers too, small differences grow: at most to
# the difference of two pictures that rounding changed independently. Its power is twice that of one change: 3 dB.
LEAST_PSNR = 40.0
INDEPENDENT = 10 * math.log10(2)


def ours(bundle: Path) -> np.ndarray:
    """The pictures of a bundle."""
    with Cascade.open(bundle, engine="onnxruntime", threads=1) as cascade:
        pixels = cascade.generate(PROMPTS, seed=SEED, **STABILITY).pixels
    assert pixels is not None
    return pixels


def one_by_one(bundle: Path, settings: Mapping[str, Any]) -> np.ndarray:
    """The pictures of a bundle, each generated alone, for programs that have a sampler of their own."""
    with Cascade.open(bundle, engine="onnxruntime", threads=1) as cascade:
        return pixels([np.asarray(cascade.generate(prompt, **settings).images[0]) for prompt in PROMPTS])


def pixels(images: Sequence[np.ndarray]) -> np.ndarray:
    """(B, 3, h, w) in 0..1 of images (h, w, 3) in 8 bits."""
    return np.stack(images).transpose(0, 3, 1, 2) / 255


def of_checkpoints(sources: Sequence[Path], place: Path) -> np.ndarray:
    """Our pictures of the model in `sources`, which is read and exported below `place`."""
    convert(sources, place / "read", "diffusers", dtype="fp32")
    export(place / "read", place / "bundle")
    return ours(place / "bundle")


def right(pictures: np.ndarray) -> int:
    """How many of the pictures show what was asked for."""
    levels = (pictures.transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)
    return sum(judge(picture, scene).right for picture, scene in zip(levels, SCENES, strict=True))


def record_pictures(
    matrix: Matrix,
    name: str,
    by: str,
    theirs: np.ndarray,
    ours: np.ndarray,
    *,
    unquantised: np.ndarray | None = None,
    version: str = "",
) -> None:
    """Record that a program opened our file of a format, and its pictures.

    `unquantised` is our picture of the model as it was; a LoRA, which changes what is drawn, has none."""
    cost = math.inf if unquantised is None else psnr(unquantised, theirs)
    agreement = psnr(ours, theirs)
    assert agreement >= min(LEAST_PSNR, cost - INDEPENDENT), (agreement, cost)
    matrix.record(name, "opened", by=by, version=version)
    matrix.record(name, "picture", agreement, by=by, version=version)
    if unquantised is not None:
        matrix.record(name, "cost", cost, by=by, version=version)
        matrix.record(name, "judged", right(theirs), by=by, version=version)
