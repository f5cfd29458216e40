"""The noise of a batch of images from their seeds, as diffusers draws it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from ...schemas.errors import UsageError
from ...schemas.limits import MAX_IMAGES
from ..engines.protocol import F32
from .torch_generator import TorchGenerator


@dataclass(frozen=True)
class PlacedSeed:
    """The seed of one image that was image `index` of a `batch` from one generator.

    The image comes out the same alone, with others, or in its batch.

    Examples:
        >>> cascade.generate("a castle", seed=PlacedSeed(7, index=2, batch=4))  # the third of num_images=4, seed=7
    """

    seed: int
    index: int = 0
    batch: int = 1


Seed = int | PlacedSeed
Seeds = Seed | Sequence[Seed]


class Noise:
    """Standard normal noise for a batch of images, from one generator or from one for each image.

    The decoder goes on with the generators in the state the prior left them in, as in diffusers."""

    def __init__(self, seeds: Seeds, count: int) -> None:
        """A number is the seed of the whole batch; in a sequence each image has its own seed.

        Raises UsageError unless there is one seed, or one for each of `count` images, and for a seed out of range."""
        self.places = _placed(seeds, count)  # of the images, in their order
        self._generators = {(place.seed, place.batch): TorchGenerator(place.seed) for place in self.places}

    def row(self, number: int) -> Self:
        """The noise of image `number` alone, which shares its generator with this noise."""
        place = self.places[number]
        alone = type(self)(place, 1)
        alone._generators = {(place.seed, place.batch): self._generators[place.seed, place.batch]}
        return alone

    def draw(self, shape: tuple[int, ...]) -> F32:
        """Draw float32 noise of `shape` (B, ...); a generator draws once for all of its images."""
        noise = np.empty((len(self.places), *shape[1:]), np.float32)
        for (seed, batch), generator in self._generators.items():
            rows = [row for row, place in enumerate(self.places) if (place.seed, place.batch) == (seed, batch)]
            noise[rows] = generator.randn_rows((batch, *shape[1:]), [self.places[row].index for row in rows])
        return noise


def _placed(seeds: Seeds, count: int) -> list[PlacedSeed]:
    if isinstance(seeds, int | np.integer):
        places = [PlacedSeed(int(seeds), index, count) for index in range(count)]
    else:
        given = [seeds] if isinstance(seeds, PlacedSeed) else seeds
        places = [each if isinstance(each, PlacedSeed) else PlacedSeed(_plain(each)) for each in given]
    if len(places) != count:
        raise UsageError(f"{len(places)} seeds for {count} images; give one, or one for each")
    for place in places:
        if place.batch > MAX_IMAGES:
            raise UsageError(f"a batch of {place.batch:.4g} images: expected at most {MAX_IMAGES}")
        if not 0 <= place.index < place.batch:
            raise UsageError(f"image {place.index} of a batch of {place.batch}: expected 0 to {place.batch - 1}")
    return places


def _plain(seed: int) -> int:
    return int(seed) if isinstance(seed, np.integer) else seed
