"""The result of `Cascade.generate`: latents, pixels, images and their settings."""

from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from PIL import Image

from ..schemas.errors import UsageError
from ..schemas.messages import with_shapes
from .engines.protocol import F32
from .images.masks import composite
from .images.png import to_images
from .sampling.noise import Noise
from .text.prompts import PromptEmbeds

Output = Literal["images", "latents", "prior"]


@dataclass(frozen=True)
class Result:
    """B generated images: latents, pixels, and for each image the settings that generate it again.

    Arrays that were not asked for are None. All arrays are float32."""

    prior_latents: F32  # (B, 16, h, w)
    decoder_latents: F32 | None  # (B, 4, h, w)
    pixels: F32 | None  # (B, 3, height, width) in 0..1
    settings: list[dict[str, Any]] = field(repr=False)
    embeds: PromptEmbeds = field(repr=False)  # of the B images, as `generate` takes them
    _noise: Noise | None = field(default=None, repr=False)  # as the prior left it, when only its latents were asked for
    # Picture and mask: outside the mask the picture stays.
    _kept: tuple[Image.Image, Image.Image] | None = field(default=None, repr=False)

    __repr__ = with_shapes

    @property
    def truncated(self) -> tuple[str, ...]:
        """The text that did not fit 77 tokens, of each prompt and then of each negative prompt."""
        return self.embeds.truncated

    def row(self, number: int) -> "Result":
        """The result for image `number` alone, of one that holds the prior's latents only."""
        rows = slice(number, number + 1)
        noise = self.noise_after_prior().row(number)
        return Result(self.prior_latents[rows], None, None, self.settings[rows], self.embeds.row(number), _noise=noise)

    def noise_after_prior(self) -> Noise:
        """The noise that the decoder goes on with, in a copy of its own.

        Raises UsageError unless the result holds the prior's latents only."""
        if self._noise is None:
            raise UsageError('this result has its decoder latents already: generate with output="prior"')
        return deepcopy(self._noise)

    @cached_property
    def images(self) -> list[Image.Image]:
        """B images, 8-bit RGB. Raises UsageError when only latents were asked for."""
        if self.pixels is None:
            raise UsageError('only latents were asked for: generate with output="images"')
        images = to_images(self.pixels)
        return images if self._kept is None else [composite(self._kept[0], one, self._kept[1]) for one in images]
