"""Makes the training pictures once: an array of pictures, and the scenes they show."""

import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .render import SIDE, Renderer
from .scenes import Scene, training_scenes

PER_ICON, SINGLES, PAIRS = 20, 2600, 3400


@dataclass(frozen=True)
class Dataset:
    scenes: list[Scene]
    pictures: NDArray[np.uint8]  # (n, 128, 128, 3), mapped from its file


def make_dataset(folder: Path, packages: Path, seed: int = 0, share: float = 1.0) -> None:
    """Render every training scene, or a share of them, into `folder`; all take about three minutes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, 1])
    scenes = training_scenes(rng, PER_ICON, SINGLES, PAIRS)
    order = rng.permutation(len(scenes))[: max(96, int(share * len(scenes)))]
    scenes = [scenes[place] for place in order]
    renderer = Renderer(packages)
    shape = (len(scenes), SIDE, SIDE, 3)
    pictures = np.lib.format.open_memmap(folder / "pictures.part.npy", "w+", np.uint8, shape)
    for place, scene in enumerate(scenes):
        pictures[place] = renderer.picture(scene)
        if place % 2000 == 0:
            print(f"rendered {place} of {len(scenes)}", flush=True)
    pictures.flush()
    (folder / "scenes.pickle").write_bytes(pickle.dumps(scenes))
    (folder / "pictures.part.npy").rename(folder / "pictures.npy")


def load_dataset(folder: Path) -> Dataset:
    scenes: list[Scene] = pickle.loads((folder / "scenes.pickle").read_bytes())
    return Dataset(scenes, np.load(folder / "pictures.npy", mmap_mode="r"))
