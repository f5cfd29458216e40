"""Computes the sizes of the latents from the size of an image.

| rule        | stage C side        | stage B side              | image                                     |
|-------------|---------------------|---------------------------|-------------------------------------------|
| Stability's | ceil(side / 42.67)  | ceil(side / 4)            | the requested size, any multiple of 8     |
| diffusers'  | ceil(side / 42.67)  | int(10.67 * stage C side) | often not the requested size              |

diffusers' rule gives an odd stage B side for some sizes, which cannot be decoded.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

from .errors import UsageError
from .limits import MAX_IMAGE_SIDE
from .messages import shown
from .stages import Stage

PRIOR_COMPRESSION = 42.67
DIFFUSERS_LATENT_SCALE = 10.67
VQGAN_COMPRESSION = 4
SIZE_STEP = 8
SMALLEST_SIDE = 64  # stage B's four levels need 16 latent pixels
# Pixels of latents that go through a stage at once by default: 8 rows of a 1024x1024 image.
ROW_AREA = {Stage.PRIOR: 8 * 24 * 24, Stage.DECODER: 8 * 256 * 256}


class SizePolicy(StrEnum):
    """The rule for the size of the stage B latents: Stability's (exact) or diffusers'."""

    EXACT = "exact"
    DIFFUSERS = "diffusers"


@dataclass(frozen=True)
class LatentSizes:
    """(height, width) of the latents of stage C and stage B, and of the image in pixels."""

    prior: tuple[int, int]
    decoder: tuple[int, int]
    image: tuple[int, int]


def latent_sizes(height: int, width: int, policy: SizePolicy = SizePolicy.EXACT) -> LatentSizes:
    """Return the latent sizes for an image of `height` x `width` pixels.

    Raises UsageError for a side that is no multiple of 8, too small or too large, and for a size that diffusers' rule
    cannot decode."""
    for name, side in (("height", height), ("width", width)):
        if side > MAX_IMAGE_SIDE:
            raise UsageError(f"{name} of {shown(side)}: expected at most {MAX_IMAGE_SIDE} pixels")
        if side < SMALLEST_SIDE or side % SIZE_STEP:
            nearest = max(SMALLEST_SIDE, round(side / SIZE_STEP) * SIZE_STEP)
            raise UsageError(
                f"{name} {side}: expected a multiple of {SIZE_STEP}, at least {SMALLEST_SIDE}; the nearest is {nearest}"
            )
    prior = (_prior_side(height), _prior_side(width))
    decoder = _decoder_size(prior, policy, (height, width))
    return LatentSizes(prior, decoder, (decoder[0] * VQGAN_COMPRESSION, decoder[1] * VQGAN_COMPRESSION))


def _decoder_size(prior: tuple[int, int], policy: SizePolicy, image: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of the stage B latent."""
    if policy is SizePolicy.EXACT:
        return math.ceil(image[0] / VQGAN_COMPRESSION), math.ceil(image[1] / VQGAN_COMPRESSION)
    height, width = (int(side * DIFFUSERS_LATENT_SCALE) for side in prior)
    if height % 2 or width % 2:
        raise UsageError(
            f"size {image[1]}x{image[0]}: diffusers' rule gives an odd stage B latent ({width}x{height}) that cannot "
            'be decoded; use multiples of 128, or size_policy="exact"'
        )
    return height, width


def _prior_side(side: int) -> int:
    return math.ceil(side / PRIOR_COMPRESSION)
