"""The share of prompts drawn right, through the product: convert, export, and generate with ONNX Runtime."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cascadekit import Cascade, convert, export
from cascadekit.converters.checkpoints.open_model import open_model
from cascadekit.schemas.layouts import Layout

from .captions import plain
from .judge import Judge
from .scenes import Icon, Scene, random_background, random_pair, random_single, seen_icons, seen_shapes
from .vocabulary import HELD_OUT_ICONS, HELD_OUT_SHAPES

BATCH = 16


def prompts(each: int, seed: int = 7) -> dict[str, list[Scene]]:
    """`each` scenes of each kind the judge asks for; what is held out is asked for whole."""
    rng = np.random.default_rng(seed)
    icons, shapes = seen_icons(), seen_shapes()
    held_icons, held_shapes = sorted(HELD_OUT_ICONS), sorted(HELD_OUT_SHAPES)

    def icon(name: str, style: str) -> Scene:
        return Icon(name, style, random_background(rng))

    def pair(first: tuple[str, str]) -> Scene:
        others = [shape for shape in shapes if shape[0] != first[0]]
        return random_pair(rng, first, others[rng.integers(len(others))])

    some = rng.permutation(len(icons))[:each]
    return {
        "seen icons": [icon(*icons[place]) for place in some],
        "held-out icons": [icon(*which) for which in held_icons[:each]],
        "seen shapes": [random_single(rng, *shapes[rng.integers(len(shapes))]) for _ in range(each)],
        "held-out shapes": [random_single(rng, *held_shapes[i % len(held_shapes)]) for i in range(each // 2)],
        "seen pairs": [pair(shapes[rng.integers(len(shapes))]) for _ in range(each)],
        "held-out pairs": [pair(held_shapes[i % len(held_shapes)]) for i in range(each // 2)],
    }


def make_bundle(original: Path, folder: Path) -> Path:
    """Export the original files, whose VQGAN scale is the trained one; a model folder is made too."""
    convert([original], folder / "model", Layout.DIFFUSERS, force=True)
    export(open_model([original]), folder / "bundle", force=True)
    return folder / "bundle"


def measure(bundle: Path, judge: Judge, folder: Path, each: int) -> dict[str, float]:
    """Shares drawn right; writes ``quality.json``, a sheet of all pictures, and what was wrong, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    shares: dict[str, float] = {}
    wrong: list[str] = []
    with Cascade.open(bundle) as cascade:
        for kind, scenes in prompts(each).items():
            counts: dict[str, list[bool]] = defaultdict(list)
            pictures = _generated(cascade, scenes)
            for scene, picture in zip(scenes, pictures, strict=True):
                verdict = judge.judge(picture, scene)
                counts[kind].append(verdict.right)
                for part, right in verdict.parts.items():
                    counts[f"{kind}: {part}"].append(right)
                if isinstance(scene, Icon):
                    counts[f"{kind}: style"].append(judge.style(picture, scene))
                if not verdict.right:
                    wrong.append(f"{plain(scene)} -> {verdict.seen} {verdict.parts}")
            shares |= {name: round(float(np.mean(rights)), 3) for name, rights in counts.items()}
            rows = [
                np.concatenate(pictures[at : at + BATCH], axis=1)
                for at in range(0, len(pictures) // BATCH * BATCH, BATCH)
            ]
            if rows:
                Image.fromarray(np.concatenate(rows)).save(folder / f"{kind.replace(' ', '-')}.png")
            print(kind, shares[kind], flush=True)
    (folder / "quality.json").write_text(json.dumps(shares, indent=1))
    (folder / "wrong.txt").write_text("\n".join(wrong))
    return shares


def _generated(cascade: Cascade, scenes: Sequence[Scene]) -> list[np.ndarray]:
    made: list[np.ndarray] = []
    for at in range(0, len(scenes), BATCH):
        texts = [plain(scene) for scene in scenes[at : at + BATCH]]
        made += [np.asarray(image) for image in cascade.generate(texts, seed=at).images]
    return made
