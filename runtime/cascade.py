"""The cascade: prompt -> embeddings -> prior latents -> decoder latents -> images.

The three pipelines of diffusers are three calls here (`encode_prompt`, `prior`, `decode`), and `generate` makes all
three. With the same seed, sizes and settings the latents equal those of diffusers' pipelines.
"""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from inspect import signature
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, Unpack

import numpy as np
from PIL import Image

from ..schemas.bundle import ENCODER_GRAPH, Manifest
from ..schemas.errors import UsageError
from ..schemas.limits import MAX_PIXELS_TOGETHER
from ..schemas.settings import (
    DECODER_SAMPLING,
    PRIOR_SAMPLING,
    SETTINGS,
    Sampling,
    SamplingOptions,
    Settings,
    SettingsOptions,
    parse_settings,
    require_known,
)
from ..schemas.sizes import SizePolicy, latent_sizes
from ..schemas.stages import Stage
from ..storage.bundle import open_bundle
from .engines.engine_table import make_engine
from .engines.mixed_bundles import with_stages_of
from .engines.protocol import F32, Engine, Tensors
from .engines.tensorrt.engine import Refit
from .images.masks import as_mask, composite, fit_mask, latent_mask
from .images.metadata import image_settings
from .images.pictures import Picture, as_picture, clip_pixels, effnet_input, fit, vqgan_input
from .images.png import to_images
from .memory.residency import RESIDENT, MemoryPolicy
from .networks import Networks
from .sampling.controlnets import (
    INPAINTING,
    ControlPicture,
    control_image,
    control_residuals,
    require_control,
    summed,
)
from .sampling.loop import Conditions, OnStep, StageSampling, Start, Step, sample_stage
from .sampling.noise import Noise, Seeds, plain_seeds, seed_settings
from .sampling.samplers import check_schedules
from .text.prompts import CachedTextEncoder, PromptEmbeds, as_texts, encode_texts
from .text.tokenizer import ClipTokenizer

__all__ = ["Cascade", "ControlPicture", "OnStep", "PromptEmbeds", "Result", "Settings", "Start", "Step"]

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
            raise UsageError("only latents were asked for: generate with output='images'")
        images = to_images(self.pixels)
        return images if self._kept is None else [composite(self._kept[0], one, self._kept[1]) for one in images]


class Cascade:
    """Stable Cascade from an exported bundle, on one engine.

        with Cascade.open("bundle") as cascade:
            image = cascade.generate("an image of a shiba inu", seed=0).images[0]

    The stages can be called one by one, and every step of the sampling can be watched:

            embeds = cascade.encode_prompt("an image of a shiba inu")
            for step in cascade.prior(embeds, height=1024, width=1024, steps=20, guidance=4.0, seed=0):
                print(step.index + 1, "of", step.steps)
            for step in cascade.decode(step.latents, embeds, height=1024, width=1024, steps=10):
                pass
            pixels = cascade.pixels(step.latents)  # (1, 3, 1024, 1024) float32 in 0..1

    Heights and widths are pixels of the image, multiples of 8. Latents and embeddings are float32 arrays whose first
    axis is the batch. A picture is a path or a PIL image. All errors are CascadeError: UsageError for arguments,
    EngineError for a stage that cannot be loaded or run, UnsoundError for a stage whose output is NaN, infinite, or one
    value throughout.
    """

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
        not depend on it."""
        self.engine = engine
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.rows = rows
        self.networks = Networks(engine, manifest, memory, checked=checked)
        self.residency = self.networks.residency
        self._encode_text = CachedTextEncoder(partial(self.networks.use, Stage.TEXT_ENCODER))

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        device: str = "cpu",
        *,
        engine: str = "onnxruntime",
        threads: int | None = None,
        memory: str = "resident",
        rows: int | None = None,
        stages: Mapping[Stage, str | Path] | None = None,
        allow_cpu: bool = False,
        vram: int | None = None,
        refit: Refit | None = None,
    ) -> Self:
        """Open an exported bundle on `device`, "cpu" or "cuda".

        `engine` is a name from `engine_table`. "auto" takes the fastest engine that is installed; it may compute in
        bf16, and then images differ slightly. `threads=None` leaves the number to the engine.

        `memory` is "resident", "staged" or a size such as "8GB". `vram` bounds the bytes of GPU memory that TensorRT's
        stages take together. `allow_cpu` lets ONNX Runtime compute on the CPU what it cannot compute on the GPU.
        `refit` gives TensorRT plans the weights of this bundle. `stages` takes single stages from other bundles, such
        as a lite decoder for a full prior.

        Raises UsageError when there is no bundle or no such engine, or when stages do not fit together; EngineError
        when the engine cannot run on this machine."""
        policy = MemoryPolicy.parse(memory)
        opened = open_bundle(Path(bundle))
        make = partial(
            make_engine, engine, device=device, threads=threads, allow_cpu=allow_cpu, memory_budget=vram, refit=refit
        )
        runs: Engine = make(opened)
        manifest = opened.manifest
        if stages:
            others = {stage: open_bundle(Path(path)) for stage, path in stages.items()}
            engines = {stage: make(other) for stage, other in others.items()}
            runs, manifest = with_stages_of(runs, opened, engines, others)
        return cls(runs, manifest, ClipTokenizer.open(opened.tokenizer, manifest.text_rows), memory=policy, rows=rows)

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative: str | Sequence[str] = "",
        embeds: PromptEmbeds | None = None,
        num_images: int = 1,
        seed: Seeds | None = None,
        settings: Settings | None = None,
        image_prompts: Sequence[Picture] = (),
        image_embeds: F32 | None = None,
        init_image: Picture | None = None,
        mask: Picture | None = None,
        controls: Sequence[ControlPicture] = (),
        latents: F32 | None = None,
        output: Output = "images",
        on_step: OnStep = lambda stage, step: None,
        **overrides: Unpack[SettingsOptions],
    ) -> Result:
        """Generate `num_images` images for each prompt, or for each row of `embeds`.

            cascade.generate("a lighthouse", seed=0, width=1024, height=768, prior_steps=30).images[0].save("a.png")

        A number as `seed` is the seed of the whole batch, as in diffusers. A sequence of seeds gives each image its
        own; a PlacedSeed is an image's place in a batch; None chooses a number at random. `overrides` are fields of
        `settings`; the size defaults to the bundle's.

        `image_prompts` are followed together; `image_embeds` (1, n, 768) float32 stand for n of them. `init_image` is
        varied: the higher `strength`, the more. With `mask`, white where the image is generated anew, the rest of
        `init_image` stays as it is. `controls` are pictures for ControlNets; the inpainting ControlNet takes the mask
        too. `latents` (B, 16, h, w) float32 replace the prior's first noise.

        `output` ends early: "latents" makes no images, "prior" runs no decoder. `on_step` is called after every step;
        it may put other latents into the step, and raise to cancel.

        Raises UsageError for an argument out of range, a picture that cannot be read, an unknown setting, or a stage
        that the bundle lacks; UnsoundError when a stage's output is no image or no latents."""
        chosen = self._settings(settings, overrides)
        size = latent_sizes(chosen.height, chosen.width, chosen.size_policy)  # raises before anything is loaded
        check_schedules(chosen, varies=init_image is not None)
        if num_images < 1:
            raise UsageError(f"num_images={num_images}: 0 images are none; expected at least 1")
        _require_room(num_images * (len(as_texts(prompt or "")) if embeds is None else len(embeds)), size.image)
        if image_prompts and image_embeds is not None:
            raise UsageError("image_prompts and image_embeds: give one of them")
        init = None if init_image is None else as_picture(init_image)
        controls = [replace(control, picture=as_picture(control.picture)) for control in controls]
        mask = None if mask is None else _open_mask(mask, init, controls)
        kept = None
        if init is not None and mask is not None:  # both at the image's size
            kept = fit(init, size.image[1], size.image[0]), fit_mask(mask, size.image[1], size.image[0])
        prompts, encoded = self._encoded(prompt, negative, embeds, chosen)
        repeated = encoded.repeated(num_images)
        seed = secrets.randbelow(1 << 32) if seed is None else plain_seeds(seed)
        noise = Noise(seed, len(repeated))
        start, decoder_start = self._starts(init, kept and kept[1], chosen, decoder=output != "prior")
        if image_prompts:
            image_embeds = self.encode_images(image_prompts)
        prior = self.prior(
            repeated,
            height=chosen.height,
            width=chosen.width,
            seed=noise,
            image_embeds=image_embeds,
            latents=latents,
            start=start,
            control=self.residuals(controls, height=chosen.height, width=chosen.width, mask=mask),
            sampling=chosen.prior,
        )
        prior_latents = _run(Stage.PRIOR, prior, on_step)
        described = image_settings(
            self.engine,
            self.manifest,
            chosen,
            prompts=prompts,
            negatives=as_texts(negative),
            seeds=[seed_settings(seed, index, len(repeated)) for index in range(len(repeated))],
        )
        if output == "prior":
            return Result(prior_latents, None, None, described, repeated)
        decoder = self.decode(
            prior_latents,
            repeated,
            height=chosen.height,
            width=chosen.width,
            seed=noise,
            size_policy=chosen.size_policy,
            start=decoder_start,
            sampling=chosen.decoder,
        )
        decoder_latents = _run(Stage.DECODER, decoder, on_step)
        pixels = self.pixels(decoder_latents) if output == "images" else None
        return Result(prior_latents, decoder_latents, pixels, described, repeated, _kept=kept)

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
        if not prompts or len(negatives) != len(prompts):
            raise UsageError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one for each")
        texts = encode_texts(
            [*prompts, *negatives], self.tokenizer, self._encode_text, weighted=weighted, long=long_prompts
        )
        (text, negative_text), (pooled, negative_pooled) = (
            np.split(array, 2) for array in (texts.clip_text, texts.pooled)
        )
        return PromptEmbeds(text, pooled, negative_text, negative_pooled, texts.truncated)

    def encode_images(self, pictures: Sequence[Picture]) -> F32:
        """Embed n image prompts for `prior`, which follows them together: (1, n, 768) float32.

        Raises UsageError when the bundle has no image encoder."""
        side = self.networks.size_of(Stage.IMAGE_ENCODER, "pixel_values", axis=2)
        with self.networks.use(Stage.IMAGE_ENCODER) as encode:
            pixels = clip_pixels([as_picture(picture) for picture in pictures], side)
            return encode({"pixel_values": pixels})["image_embeds"][None]

    def encode_picture(self, picture: Picture, *, height: int, width: int) -> F32:
        """The prior's latents (1, 16, h, w) float32 of an image of `height` x `width` that looks like `picture`.

        Raises UsageError when the bundle has no effnet encoder."""
        return self._effnet(effnet_input(as_picture(picture), latent_sizes(height, width).prior))

    def encode_details(self, picture: Picture, *, height: int, width: int) -> F32:
        """The decoder's latents (1, 4, h, w) float32 of `picture` at `height` x `width`, from the vqgan's encoder.

        Raises UsageError when the bundle's vqgan has no encoder."""
        with self.networks.use(Stage.VQGAN, ENCODER_GRAPH) as encode:
            latents = encode({"images": vqgan_input(as_picture(picture), height, width)})["latents"]
        assert self.manifest.vqgan_scale is not None  # every manifest with a vqgan has one
        return np.asarray(latents / self.manifest.vqgan_scale, np.float32)

    def residuals(
        self, controls: Sequence[ControlPicture], *, height: int, width: int, mask: Picture | None = None
    ) -> dict[str, F32]:
        """The sum of what ControlNets add to the prior for an image of this size: (1, c, h, w) float32 by port.

        `mask` is for inpainting. Raises UsageError for an unknown name, and when the bundle lacks a stage or its prior
        takes no residuals."""
        size = latent_sizes(height, width).prior
        found = []
        for control in controls:
            stage = require_control(self.manifest, control.name)[0]
            picture = as_picture(control.picture)
            masked = None if mask is None else as_mask(mask, picture.size)
            image = control_image(control.name, picture, size, mask=masked, encode=self._effnet)
            with self.networks.use(stage) as run:
                residuals = control_residuals(self.manifest, control.name, image, run, strength=control.strength)
            found.append(residuals)
        return summed(found, size)

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

        Raises UsageError for a size, shape, seed or field of `sampling` that cannot be."""
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
        batch = StageSampling(shape, sampling.changed(**changes), _noise(seed, shape[0]), latents, start, self.rows)
        return self._sample(Stage.PRIOR, Conditions(positive | residuals, negative | residuals), batch)

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
        batch = StageSampling(shape, sampling.changed(**changes), _noise(seed, shape[0]), latents, start, self.rows)
        return self._sample(Stage.DECODER, Conditions(positive, negative), batch)

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

    def close(self) -> None:
        """Free the memory of every loaded stage; a later call loads the stages again."""
        self.residency.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _effnet(self, pixels: F32) -> F32:
        with self.networks.use(Stage.EFFNET_ENCODER) as encode:
            return encode({"pixels": pixels})["effnet"]

    def _sample(self, stage: Stage, conditions: Conditions, batch: StageSampling) -> Iterator[Step]:
        return sample_stage(self.networks, stage, conditions, batch, partial(self.preview, stage))

    def _settings(self, settings: Settings | None, overrides: Mapping[str, Any]) -> Settings:
        require_known("generate", overrides, SETTINGS | signature(Cascade.generate).parameters.keys())
        if settings is None:
            return parse_settings(overrides, self.manifest.default_size)
        return replace(settings, **overrides)

    def _encoded(
        self,
        prompt: str | Sequence[str] | None,
        negative: str | Sequence[str],
        embeds: PromptEmbeds | None,
        chosen: Settings,
    ) -> tuple[list[str], PromptEmbeds]:
        """The prompts, none for `embeds`, and their embeddings."""
        if (prompt is None) == (embeds is None):
            raise UsageError("expected a prompt, or the embeddings of one: give one of them")
        if embeds is not None:
            return [], embeds
        assert prompt is not None
        prompts = as_texts(prompt)
        found = self.encode_prompt(prompts, negative, weighted=chosen.weighted, long_prompts=chosen.long_prompts)
        return prompts, found

    def _starts(
        self, picture: Image.Image | None, mask: Image.Image | None, chosen: Settings, *, decoder: bool
    ) -> tuple[Start | None, Start | None]:
        """The starts of prior and decoder for an initial picture; `mask` has the image's size.

        The decoder follows the prior's latents anyway. It has a start only to keep what is outside a mask, and then its
        sampling begins with noise alone."""
        if picture is None:
            return None, None
        sizes = latent_sizes(chosen.height, chosen.width, chosen.size_policy)
        latents = self.encode_picture(picture, height=chosen.height, width=chosen.width)
        if mask is None:
            return Start(latents, chosen.strength), None
        start = Start(latents, chosen.strength, latent_mask(mask, sizes.prior))
        if not decoder:
            return start, None
        details = self.encode_details(picture, height=sizes.image[0], width=sizes.image[1])
        return start, Start(details, 1.0, latent_mask(mask, sizes.decoder))


def _require_room(count: int, size: tuple[int, int]) -> None:
    """Raise UsageError for more images of `size` (height, width) than one call may keep in memory."""
    most = max(1, MAX_PIXELS_TOGETHER // (size[0] * size[1]))
    if count > most:
        raise UsageError(f"{count} images of {size[1]}x{size[0]} at once: expected at most {most}; use several calls")


def _open_mask(mask: Picture, init: Image.Image | None, controls: Sequence[ControlPicture]) -> Image.Image:
    """The mask of the initial picture, else of the picture of the inpainting ControlNet."""
    masked = [*([] if init is None else [init]), *(each.picture for each in controls if each.name == INPAINTING)]
    if not masked:
        raise UsageError("mask needs init_image=PICTURE, or an inpainting control with its picture: give one of them")
    return as_mask(mask, as_picture(masked[0]).size)


def _noise(seed: Seeds | Noise, count: int) -> Noise:
    return seed if isinstance(seed, Noise) else Noise(seed, count)


def _run(stage: Stage, steps: Iterator[Step], on_step: OnStep) -> F32:
    """Make all steps; returns the latents of the last one."""
    for step in steps:
        on_step(stage, step)
    return step.latents


def _rows(array: F32, count: int) -> F32:
    """Repeat a single row `count` times, or take `count` rows as they are."""
    if len(array) not in (1, count):
        raise UsageError(f"conditions for {len(array)} images where {count} are generated: give one, or one for each")
    return np.repeat(array, count, axis=0) if len(array) == 1 else array
