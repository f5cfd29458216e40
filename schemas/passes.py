"""Counts the work of images: the steps of each stage, and the multiply-adds of a step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .stages import Stage

if TYPE_CHECKING:
    from .manifest import Manifest
    from .settings import Settings


@dataclass(frozen=True)
class StagePass:
    """The part of one stage in one group of images: its steps, and the multiply-adds of a step."""

    steps: int
    work: float


Passes = Mapping[Stage, StagePass]  # one group of images that are generated together


def passes_of(manifest: "Manifest", settings: "Settings", images: int) -> Passes:
    """The steps and the work of each stage for `images` images that are generated together."""
    from .config_json import from_json
    from .operations import multiply_adds
    from .sizes import latent_sizes

    sizes = latent_sizes(settings.height, settings.width, settings.size_policy)
    found = {}
    for stage, sampling, (height, width) in (
        (Stage.PRIOR, settings.prior, sizes.prior),
        (Stage.DECODER, settings.decoder, sizes.decoder),
        (Stage.VQGAN, None, sizes.decoder),
    ):
        if stage in manifest.stages:
            rows = images * (2 if sampling and sampling.guides else 1)
            dims = {"batch": rows, "height": height, "width": width, "tokens": 77, "images": 1}
            steps = (len(sampling.timesteps) - 1 if sampling.timesteps else sampling.steps) if sampling else 1
            found[stage] = StagePass(steps, multiply_adds(from_json(stage, manifest.stages[stage].config), dims))
    return found


def usual_work(manifest: "Manifest") -> float:
    """Multiply-adds of one image with the bundle's default size and the default settings."""
    from .settings import Settings

    passes = passes_of(manifest, Settings(*manifest.default_size), 1)
    return sum(each.steps * each.work for each in passes.values())
