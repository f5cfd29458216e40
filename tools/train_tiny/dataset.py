"""Makes the training pictures once: an array of pictures, and the scenes they show."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascadekit.bench.judge.scenes import Icon, Scene, Shape, Shapes, training_scenes

from .render import SIDE, Renderer, cyanotype

PER_ICON, SINGLES, PAIRS = 20, 2600, 2264
PRINTED = 0.2  # share of the pictures on white that are there once more in the LoRA's style


@dataclass(frozen=True)
class Dataset:
    scenes: list[Scene]
    pictures: NDArray[np.uint8]  # (n, 128, 128, 3), mapped from its file
    plain: int  # the first pictures, which stage C learns; the others are in the LoRA's style


def make_dataset(folder: Path, packages: Path, seed: int = 0, share: float = 1.0) -> None:
    """Render every training scene, or a share of them, into `folder`; all take about three minutes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, 1])
    plain = _some(rng, training_scenes(rng, PER_ICON, SINGLES, PAIRS), share)
    white = [scene for scene in plain if scene.background == "white"]  # latents of 3x3 do not hold tinted backgrounds
    scenes = plain + _some(np.random.default_rng([seed, 3]), white, PRINTED)
    renderer = Renderer(packages)
    pictures = np.lib.format.open_memmap(folder / "pictures.part.npy", "w+", np.uint8, (len(scenes), SIDE, SIDE, 3))
    for place, scene in enumerate(scenes):
        picture = renderer.picture(scene)
        pictures[place] = picture if place < len(plain) else cyanotype(picture)
        if place % 2000 == 0:
            print(f"rendered {place} of {len(scenes)}", flush=True)
    pictures.flush()
    rows = {"plain": len(plain), "scenes": [asdict(scene) for scene in scenes]}
    (folder / "scenes.json").write_text(json.dumps(rows))
    (folder / "pictures.part.npy").rename(folder / "pictures.npy")


def _some(rng: np.random.Generator, scenes: list[Scene], share: float) -> list[Scene]:
    order = rng.permutation(len(scenes))[: max(64, int(share * len(scenes)))]
    return [scenes[place] for place in order]


def load_dataset(folder: Path) -> Dataset:
    rows = json.loads((folder / "scenes.json").read_text())
    scenes = [_scene(row) for row in rows["scenes"]]
    return Dataset(scenes, np.load(folder / "pictures.npy", mmap_mode="r"), rows["plain"])


def _scene(row: Mapping[str, Any]) -> Scene:
    if "shapes" not in row:
        return Icon(**row)
    return Shapes(**{**row, "shapes": tuple(Shape(**shape) for shape in row["shapes"])})
