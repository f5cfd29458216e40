"""The stages of the cascade, each as one call on numpy arrays."""

from __future__ import annotations  # help() shows the types as they are written here

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Unpack

import numpy as np
from PIL import Image

from ..schemas.errors import UsageError
from ..schemas.manifest import ENCODER_GRAPH, Manifest
from ..schemas.messages import known_keywords
from ..schemas.settings import DECODER_SAMPLING, PRIOR_SAMPLING, Sampling, SamplingOptions
from ..schemas.sizes import SizePolicy, latent_sizes
from ..schemas.stages import Stage
from .engines.protocol import F32, Engine, Tensors
from .images.masks import as_mask
from .images.pictures import Picture, as_picture, as_pictures, clip_pixels, effnet_input, fitted_pixels
from .images.png import to_images
from .memory.residency import RESIDENT, MemoryPolicy
from .networks import Networks
from .sampling.controlnets import CONTROLS, ControlPicture, FilterInputs, require_control, summed
from .sampling.loop import StageConditions, StageSampling, Start, Step, sample_stage
from .sampling.noise import Noise, Seeds
from .text.prompts import CachedTextEncoder, PromptEmbeds, as_texts, encode_texts
from .text.tokenizer import ClipTokenizer

TEXT_ROWS = 16  # prompts that the text encoder takes at once


class CascadeStages:
    """The stages of one bundle on one engine: encoders, prior, decoder, vqgan and previewer.

    `Cascade` adds `open` and `generate`; its docstring describes the arguments."""

    def __init__(
        self,
        engine: Engine,
        manifest: Manifest,
        tokenizer: ClipTokenizer,
        *,
        memory: MemoryPolicy = RESIDENT,
        rows: int | None = None,
        checked: bool = True,
    ) -> None:
        """`memory` decides which stages stay loaded. `checked=False` turns UnsoundError off.

        `rows` bounds the batch that goes through prior or decoder at once (guidance doubles the batch), and so the
        memory of activations. By default it is 8 rows of a 1024x1024 image, and more rows of smaller images. Images do
        not depend on it, except for rounding: with `rows=1`, an image has the same bytes alone and in any batch."""
        if rows is not None and rows < 1:
            raise UsageError(f"rows={rows}: expected at least 1, or None for the default")
        self.engine = engine
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.rows = rows
        self.networks = Networks(engine, manifest, memory, checked=checked)
        self.residency = self.networks.residency
        self.timings = self.networks.timings  # of everything that this cascade has done
        self._encode_text = CachedTextEncoder(partial(self.networks.use, Stage.TEXT_ENCODER))

    @known_keywords
    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        negative: str | Sequence[str] = "",
        *,
        weighted: bool = False,
        long_prompts: bool = False,
    ) -> PromptEmbeds:
        """Embed B prompts and B negative prompts; one negative prompt serves all. Embeddings are cached.

        `weighted` reads (words:1.2) as emphasis. `long_prompts` encodes the text beyond 77 tokens in further chunks,
        see `text.prompts`. Raises UsageError for another number of negative prompts, and for a prompt that is no
        text or too long."""
        prompts, negatives = as_texts(prompt), as_texts(negative)
        if len(negatives) == 1:
            negatives *= len(prompts)
        if not prompts:
            raise UsageError("no prompts; give a text, or a list of texts")
        if len(negatives) != len(prompts):
            raise UsageError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one for each")
        texts = encode_texts(
            [*prompts, *negatives],
            self.tokenizer,
            self._encode_text,
            weighted=weighted,
            long=long_prompts,
            batch=min(self.rows or TEXT_ROWS, TEXT_ROWS),
        )
        (text, negative_text), (pooled, negative_pooled) = (
            np.split(array, 2) for array in (texts.clip_text, texts.pooled)
        )
        return PromptEmbeds(text, pooled, negative_text, negative_pooled, texts.truncated)

    def encode_images(self, pictures: Picture | Sequence[Picture]) -> F32:
        """Embed n image prompts for `prior`, which follows them together: (1, n, 768) float32.

        Raises UsageError when the bundle has no image encoder."""
        opened = as_pictures(pictures)
        side = self.networks.size_of(Stage.IMAGE_ENCODER, "pixel_values", axis=2)
        with self.networks.use(Stage.IMAGE_ENCODER) as encode:
            return encode({"pixel_values": clip_pixels(opened, side)})["image_embeds"][None]

    def encode_picture(self, picture: Picture, *, height: int, width: int) -> F32:
        """The prior's latents (1, 16, h, w) float32 of an image of `height` x `width` that looks like `picture`.

        Raises UsageError when the bundle has no effnet encoder."""
        return self._effnet(effnet_input(as_picture(picture), latent_sizes(height, width).prior))

    def encode_details(self, picture: Picture, *, height: int, width: int) -> F32:
        """The decoder's latents (1, 4, h, w) float32 of `picture` at `height` x `width`, from the vqgan's encoder.

        Raises UsageError when the bundle's vqgan has no encoder."""
        with self.networks.use(Stage.VQGAN, ENCODER_GRAPH) as encode:
            latents = encode({"images": fitted_pixels(as_picture(picture), height, width)})["latents"]
        assert self.manifest.vqgan_scale is not None  # every manifest with a vqgan has one
        return np.asarray(latents / self.manifest.vqgan_scale, np.float32)

    def residuals(
        self, controls: Sequence[ControlPicture], *, height: int, width: int, mask: Picture | None = None
    ) -> dict[str, F32]:
        """The sum of what ControlNets add to the prior for an image of this size: (1, c, h, w) float32 by port.

        `mask` is for inpainting. Raises UsageError for an unknown name, and when the bundle lacks a stage or its prior
        takes no residuals."""
        size = latent_sizes(height, width).prior
        return summed((self._residuals(control, size, mask) for control in controls), size)

    def prior(
        self,
        embeds: PromptEmbeds,
        *,
        height: int,
        width: int,
        seed: Seeds | Noise = 0,
        image_embeds: F32 | None = None,
        latents: F32 | None = None,
        start: Start | None = None,
        control: Tensors | None = None,
        sampling: Sampling = PRIOR_SAMPLING,
        **changes: Unpack[SamplingOptions],
    ) -> Iterator[Step]:
        """Sample stage C, a Step at a time; the last Step's latents (B, 16, h, w) float32 go to `decode`.

        `sampling` is 20 steps with guidance 4 by default; `changes` are fields of it: steps=30, guidance=6.0.
        `image_embeds` (1 or B, n, 768) float32 are image prompts. `latents` (B, 16, h, w) float32 replace the first
        noise. `start` is a picture to begin with. `control` are residuals by port, (1 or B, c, h, w) float32 each.

        Raises UsageError for an invalid size, shape, seed or field of `sampling`."""
        shape = (len(embeds), self.networks.size_of(Stage.PRIOR, "sample"), *latent_sizes(height, width).prior)
        if image_embeds is None:
            image_embeds = np.zeros((1, 1, self.networks.size_of(Stage.PRIOR, "clip_img", axis=2)), np.float32)
        image_embeds = _rows(image_embeds, len(embeds))
        residuals = {port: _rows(value, len(embeds)) for port, value in (control or {}).items()}
        positive = {"clip_text": embeds.clip_text, "clip_text_pooled": embeds.pooled, "clip_img": image_embeds}
        negative = {
            "clip_text": embeds.negative_clip_text,
            "clip_text_pooled": embeds.negative_pooled,
            "clip_img": np.zeros_like(image_embeds),
        }
        batch = StageSampling(
            shape, sampling.changed(**changes), _noise(seed, shape[0]), latents=latents, start=start, rows=self.rows
        )
        return self._sample(Stage.PRIOR, StageConditions(positive | residuals, negative | residuals), batch)

    def decode(
        self,
        prior_latents: F32,
        embeds: PromptEmbeds,
        *,
        height: int,
        width: int,
        seed: Seeds | Noise = 0,
        size_policy: SizePolicy = SizePolicy.EXACT,
        latents: F32 | None = None,
        start: Start | None = None,
        sampling: Sampling = DECODER_SAMPLING,
        **changes: Unpack[SamplingOptions],
    ) -> Iterator[Step]:
        """Sample stage B under stage C's latents (B, 16, h, w) float32; the last Step's latents go to `pixels`.

        `sampling` is 10 steps without guidance by default. The other arguments are those of `prior`, with latents
        of (B, 4, h, w). Raises UsageError as `prior` does."""
        if len(prior_latents) != len(embeds):
            raise UsageError(f"{len(prior_latents)} prior latents for {len(embeds)} prompts: expected one for each")
        size = latent_sizes(height, width, size_policy).decoder
        shape = (len(prior_latents), self.networks.size_of(Stage.DECODER, "sample"), *size)
        positive = {"clip_text_pooled": embeds.pooled, "effnet": prior_latents}
        negative = {"clip_text_pooled": embeds.negative_pooled, "effnet": np.zeros_like(prior_latents)}
        batch = StageSampling(
            shape, sampling.changed(**changes), _noise(seed, shape[0]), latents=latents, start=start, rows=self.rows
        )
        return self._sample(Stage.DECODER, StageConditions(positive, negative), batch)

    def pixels(self, latents: F32) -> F32:
        """Decode stage B's latents (B, 4, h, w) to pixels (B, 3, 4h, 4w) float32 in 0..1, one image at a time."""
        found = []
        with self.networks.load(Stage.VQGAN) as decode:
            for number, one in enumerate(latents):
                images = decode({"latents": one[None]})["images"]
                self.networks.require_sound(Stage.VQGAN, images, f"image {number + 1} of {len(latents)}")
                found.append(images)
        return np.concatenate(found)

    def preview(self, stage: Stage, latents: F32) -> list[Image.Image]:
        """B small images of stage C's latents by the previewer, or B images of stage B's latents by the vqgan.

        Raises UsageError when the bundle has no previewer."""
        if stage is Stage.DECODER:
            return to_images(self.pixels(latents))
        with self.networks.use(Stage.PREVIEWER) as show:
            return to_images(show({"latents": latents})["images"])

    def _effnet(self, pixels: F32) -> F32:
        with self.networks.use(Stage.EFFNET_ENCODER) as encode:
            return encode({"pixels": pixels})["effnet"]

    def _residuals(self, control: ControlPicture, size: tuple[int, int], mask: Picture | None) -> dict[str, F32]:
        """The residuals of one ControlNet for prior latents of `size` (h, w), times its strength."""
        stage = require_control(self.manifest, control.name)[0]
        picture = as_picture(control.picture)
        masked = None if mask is None else as_mask(mask, picture.size)
        image = CONTROLS[control.name].filter(FilterInputs(picture, size, masked, self._effnet))
        with self.networks.use(stage) as run:
            residuals = run({"control_image": image})
        return {port: residual * np.float32(control.strength) for port, residual in residuals.items()}

    def _sample(self, stage: Stage, conditions: StageConditions, batch: StageSampling) -> Iterator[Step]:
        return sample_stage(self.networks, stage, conditions, batch, partial(self.preview, stage))


def _noise(seed: Seeds | Noise, count: int) -> Noise:
    return seed if isinstance(seed, Noise) else Noise(seed, count)


def _rows(array: F32, count: int) -> F32:
    """Repeat a single row `count` times, or take `count` rows as they are."""
    if len(array) not in (1, count):
        raise UsageError(f"conditions for {len(array)} images where {count} are generated: give one, or one for each")
    return np.repeat(array, count, axis=0) if len(array) == 1 else array
