"""The noise of a batch of images from their seeds, as diffusers draws it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ...schemas.errors import UsageError
from ...schemas.limits import MAX_IMAGES
from ..engines.protocol import F32
from .torch_generator import TorchGenerator


@dataclass(frozen=True)
class PlacedSeed:
    """The seed of one image that was image `index` of a `batch` from one generator.

    The image comes out the same alone, with others, or in its batch."""

    seed: int
    index: int = 0
    batch: int = 1


Seed = int | PlacedSeed | TorchGenerator
Seeds = Seed | Sequence[Seed]


def plain_seeds(seeds: Seeds) -> Seeds:
    """Seeds with numpy's integers turned into Python's, and any other sequence into a list."""
    if isinstance(seeds, PlacedSeed | TorchGenerator):
        return seeds
    if isinstance(seeds, int | np.integer):
        return int(seeds)
    return [int(seed) if isinstance(seed, np.integer) else seed for seed in seeds]


class Noise:
    """Standard normal noise for a batch of images, from one generator or from one for each image.

    The decoder goes on with the generators in the state the prior left them in, as in diffusers."""

    def __init__(self, seeds: Seeds, count: int) -> None:
        """Raises UsageError unless there is one seed, or one for each of `count` images."""
        seeds = plain_seeds(seeds)
        if isinstance(seeds, int):
            given: list[Seed] = [PlacedSeed(seeds, index, count) for index in range(count)]
        elif isinstance(seeds, TorchGenerator):
            given = [seeds] * count
        else:
            given = [seeds] if isinstance(seeds, PlacedSeed) else list(seeds)
        if len(given) != count:
            raise UsageError(f"{len(given)} seeds for {count} images; give one, or one for each")
        self._shared = isinstance(seeds, TorchGenerator)
        self._sources = [PlacedSeed(seed) if isinstance(seed, int) else seed for seed in given]
        self._generators = {_key(source): _generator(source) for source in self._sources}

    def draw(self, shape: tuple[int, ...]) -> F32:
        """Draw float32 noise of `shape` (B, ...); a generator draws once for all of its images."""
        if self._shared:
            return self._generators[_key(self._sources[0])].randn(shape)
        noise = np.empty((len(self._sources), *shape[1:]), np.float32)
        for key, generator in self._generators.items():
            places = [place for place, source in enumerate(self._sources) if _key(source) == key]
            rows, batch = zip(*(_place(self._sources[place]) for place in places), strict=True)
            noise[places] = generator.randn_rows((batch[0], *shape[1:]), rows)
        return noise


def _place(source: PlacedSeed | TorchGenerator) -> tuple[int, int]:
    """Index and batch size of the image in the noise of its generator."""
    return (source.index, source.batch) if isinstance(source, PlacedSeed) else (0, 1)


def seed_settings(seed: Seeds, index: int, count: int) -> dict[str, int]:
    """The settings `seed`, `index` and `batch` that generate image `index` of `count` again.

    The dictionary is empty for a generator, whose state cannot be written down."""
    if isinstance(seed, int):
        return {"seed": seed, "index": index, "batch": count}
    own = seed if isinstance(seed, PlacedSeed | TorchGenerator) else seed[index]
    if isinstance(own, int):
        return {"seed": own, "index": 0, "batch": 1}
    return asdict(own) if isinstance(own, PlacedSeed) else {}


def _key(source: PlacedSeed | TorchGenerator) -> tuple[int, int]:
    return (id(source), 0) if isinstance(source, TorchGenerator) else (source.seed, source.batch)


def _generator(source: PlacedSeed | TorchGenerator) -> TorchGenerator:
    if isinstance(source, TorchGenerator):
        return source
    if not 0 <= source.index < source.batch:
        raise UsageError(f"image {source.index} of a batch of {source.batch}: expected 0 to {source.batch - 1}")
    if source.batch > MAX_IMAGES:
        raise UsageError(f"a batch of {source.batch:.4g} images: expected at most {MAX_IMAGES}")
    return TorchGenerator(source.seed)
