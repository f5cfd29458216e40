"""The result of `Cascade.generate`: latents, pixels, images and their settings."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from PIL import Image

from ..schemas.errors import UsageError
from .engines.protocol import F32
from .images.masks import composite
from .images.png import to_images
from .text.prompts import PromptEmbeds

Output = Literal["images", "latents", "prior"]


@dataclass(frozen=True)
class Result:
    """B generated images: latents, pixels, and for each image the settings that generate it again.

    Arrays that were not asked for are None. All arrays are float32."""

    prior_latents: F32  # (B, 16, h, w)
    decoder_latents: F32 | None  # (B, 4, h, w)
    pixels: F32 | None  # (B, 3, height, width) in 0..1
    settings: list[dict[str, Any]]
    embeds: PromptEmbeds  # of the B images, as `generate` takes them
    _kept: tuple[Image.Image, Image.Image] | None = None  # picture and mask: outside the mask the picture stays

    @property
    def truncated(self) -> tuple[str, ...]:
        """The text that did not fit 77 tokens, of each prompt and then of each negative prompt."""
        return self.embeds.truncated

    @cached_property
    def images(self) -> list[Image.Image]:
        """B images, 8-bit RGB. Raises UsageError when only latents were asked for."""
        if self.pixels is None:
            raise UsageError('only latents were asked for: generate with output="images"')
        images = to_images(self.pixels)
        return images if self._kept is None else [composite(self._kept[0], one, self._kept[1]) for one in images]
