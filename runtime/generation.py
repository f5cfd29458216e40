"""A whole generation: prompts, pictures and settings in, images with the settings that made them out."""

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from ..schemas.errors import UsageError
from ..schemas.limits import MAX_PIXELS_TOGETHER
from ..schemas.settings import Settings, parse_settings
from ..schemas.sizes import latent_sizes
from ..schemas.stages import Stage
from .images.made_with import made_with
from .images.masks import composite, fit_mask, latent_mask
from .images.pictures import fit
from .images.png import to_pictures
from .sampling.controlnets import INPAINTING, ControlPicture
from .sampling.ddpm import F32, Step
from .sampling.noise import TorchGenerator
from .sampling.samplers import check_schedules
from .sampling.seeds import Noise, PlacedSeed, Seeds, plain_seeds
from .sampling.start import Start
from .text.embeds import PromptEmbeds, as_texts

if TYPE_CHECKING:
    from .cascade import Cascade

Output = Literal["images", "latents", "prior"]
OnStep = Callable[[Stage, Step], object]


@dataclass(frozen=True)
class Result:
    """B generated images with the latents they came from and, for each, the settings that made it. What was not asked
    for is None."""

    prior_latents: F32  # (B, 16, h, w)
    decoder_latents: F32 | None  # (B, 4, h, w)
    pixels: F32 | None  # (B, 3, height, width) in 0..1
    settings: list[dict[str, Any]]
    embeds: PromptEmbeds  # of the B images, to be given again
    truncated: tuple[str, ...] = ()  # as in PromptEmbeds
    _kept: tuple[Image.Image, Image.Image] | None = None  # picture and mask: outside it the picture stays

    @cached_property
    def images(self) -> list[Image.Image]:
        """8-bit RGB. Raises UsageError when only latents were asked for."""
        if self.pixels is None:
            raise UsageError("only latents were asked for: generate with output='images'")
        pictures = to_pictures(self.pixels)
        return pictures if self._kept is None else [composite(self._kept[0], one, self._kept[1]) for one in pictures]


def generate(
    self: "Cascade",
    prompt: str | Sequence[str] | None = None,
    *,
    negative: str | Sequence[str] = "",
    embeds: PromptEmbeds | None = None,
    num_images: int = 1,
    seed: Seeds | None = None,
    settings: Settings | None = None,
    image_prompts: Sequence[Image.Image] = (),
    image_embeds: F32 | None = None,
    init_image: Image.Image | None = None,
    mask: Image.Image | None = None,
    controls: Sequence[ControlPicture] = (),
    latents: F32 | None = None,
    output: Output = "images",
    on_step: OnStep = lambda stage, step: None,
    **overrides: Any,
) -> Result:
    """Images for one prompt or several, or for `embeds` of them, `num_images` of each.

    One `seed` draws the whole batch from one generator, as diffusers does with one; a sequence gives each image its
    own, and PlacedSeed an image's place in a batch; None chooses one. `overrides` are fields of Settings; the size
    defaults to the bundle's. `on_step` is told of every step; it may put other latents into it, and raise to cancel.

    Pictures are RGB. All `image_prompts` (or `image_embeds` (1, n, 768) of such) are followed together.
    `init_image` is varied, the more the higher `strength`; with `mask` (mode L, white where to draw anew) it stays as
    it is elsewhere. `controls` go through ControlNets; that of inpainting sees the mask, too. `latents` replace the
    prior's first noise.

    Raises UsageError for a size, count, seed or picture that cannot be, or a stage that the bundle lacks."""
    chosen = _settings(self, settings, overrides)
    size = latent_sizes(chosen.height, chosen.width, chosen.size_policy)  # fails before anything is loaded
    check_schedules(chosen, varies=init_image is not None)
    if num_images < 1:
        raise UsageError(f"{num_images} images: expected at least 1")
    _require_room(num_images * (len(embeds) if embeds is not None else len(as_texts(prompt or ""))), size.image)
    if mask is not None and init_image is None and not any(control.name == INPAINTING for control in controls):
        raise UsageError(
            "a mask says what to draw anew of an initial image, or of what the inpainting ControlNet sees: give one"
        )
    if image_prompts and image_embeds is not None:
        raise UsageError("image_prompts and image_embeds: give one of them")
    kept = None if init_image is None or mask is None else _kept(init_image, mask, *size.image)
    prompts, encoded = _encoded(self, prompt, negative, embeds, chosen)
    repeated = encoded.repeated(num_images)
    seed = secrets.randbelow(1 << 32) if seed is None else plain_seeds(seed)
    noise = Noise(seed, len(repeated))
    start, decoder_start = _starts(self, init_image, kept and kept[1], chosen, decoder=output != "prior")
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
        steps=chosen.prior_steps,
        guidance=chosen.prior_guidance,
        sampler=chosen.sampler,
        shift=chosen.prior_shift,
        rescale=chosen.rescale,
        timesteps=chosen.prior_timesteps,
    )
    prior_latents = _run(Stage.PRIOR, prior, on_step)
    described = _described(self, prompts, negative, len(repeated), seed, chosen)
    if output == "prior":
        return Result(prior_latents, None, None, described, repeated, encoded.truncated)
    decoder = self.decode(
        prior_latents,
        repeated,
        height=chosen.height,
        width=chosen.width,
        seed=noise,
        size_policy=chosen.size_policy,
        start=decoder_start,
        steps=chosen.decoder_steps,
        guidance=chosen.decoder_guidance,
        sampler=chosen.sampler,
        shift=chosen.decoder_shift,
        rescale=chosen.rescale,
        timesteps=chosen.decoder_timesteps,
    )
    decoder_latents = _run(Stage.DECODER, decoder, on_step)
    pixels = self.pixels(decoder_latents) if output == "images" else None
    return Result(prior_latents, decoder_latents, pixels, described, repeated, encoded.truncated, kept)


def _require_room(count: int, size: tuple[int, int]) -> None:
    """Raise UsageError for more images than one call may keep to its end."""
    most = max(1, MAX_PIXELS_TOGETHER // (size[0] * size[1]))
    if count > most:
        raise UsageError(f"{count} images of {size[1]}x{size[0]} at once: expected at most {most}; use several calls")


def _encoded(
    cascade: "Cascade",
    prompt: str | Sequence[str] | None,
    negative: str | Sequence[str],
    embeds: PromptEmbeds | None,
    chosen: Settings,
) -> tuple[list[str], PromptEmbeds]:
    """The prompts (none for embeddings from elsewhere) and their embeddings."""
    if (prompt is None) == (embeds is None):
        raise UsageError("expected a prompt, or the embeddings of one: give one of them")
    if embeds is not None:
        return [], embeds
    assert prompt is not None
    prompts = as_texts(prompt)
    found = cascade.encode_prompt(prompts, negative, weighted=chosen.weighted, long_prompts=chosen.long_prompts)
    return prompts, found


def _starts(
    cascade: "Cascade", picture: Image.Image | None, mask: Image.Image | None, chosen: Settings, *, decoder: bool
) -> tuple[Start | None, Start | None]:
    """Where prior and decoder start. The decoder follows the prior's latents anyway; it starts from the picture only
    to keep what is outside a mask, which has the image's size, and then from noise."""
    if picture is None:
        return None, None
    sizes = latent_sizes(chosen.height, chosen.width, chosen.size_policy)
    latents = cascade.encode_picture(picture, height=chosen.height, width=chosen.width)
    if mask is None:
        return Start(latents, chosen.strength), None
    height, width = sizes.image
    start = Start(latents, chosen.strength, latent_mask(mask, sizes.prior))
    if not decoder:
        return start, None
    details = cascade.encode_details(picture, height=height, width=width)
    return start, Start(details, 1.0, latent_mask(mask, sizes.decoder))


def _kept(picture: Image.Image, mask: Image.Image, height: int, width: int) -> tuple[Image.Image, Image.Image]:
    """Picture and mask at the image's size."""
    return fit(picture, width, height), fit_mask(mask, width, height)


def _settings(cascade: "Cascade", settings: Settings | None, overrides: dict[str, Any]) -> Settings:
    if settings is None:
        return parse_settings(overrides, cascade.manifest.default_size)
    try:
        return replace(settings, **overrides)
    except TypeError as error:
        raise UsageError(f"unknown setting: {error}") from error


def _run(stage: Stage, steps: Iterator[Step], on_step: OnStep) -> F32:
    """Go through all steps; the last one's latents."""
    for step in steps:
        on_step(stage, step)
    return step.latents


def _described(
    cascade: "Cascade",
    prompts: list[str],
    negative: str | Sequence[str],
    count: int,
    seed: Seeds,
    chosen: Settings,
) -> list[dict[str, Any]]:
    """For each of `count` images what `generate` needs to draw it again; of embeddings the prompt is not known."""
    negatives = as_texts(negative)
    made = made_with(cascade.engine, cascade.manifest)
    words: list[dict[str, str]] = [
        {"prompt": prompt, "negative": negatives[0 if len(negatives) == 1 else number]}
        for number, prompt in enumerate(prompts)
    ] or [{}]
    return [
        {
            **words[index * len(words) // count],
            **_seed_of(seed, index, count),
            **chosen.to_json(),
            "vqgan_scale": cascade.manifest.vqgan_scale,
            **made,
            "created_by": cascade.manifest.created_by,
        }
        for index in range(count)
    ]


def _seed_of(seed: Seeds, index: int, count: int) -> dict[str, int]:
    """How to draw image `index` again: its own seed, or its place in a batch of one generator."""
    if isinstance(seed, int):
        return {"seed": seed, "index": index, "batch": count}
    own = seed if isinstance(seed, PlacedSeed | TorchGenerator) else seed[index]
    if isinstance(own, int):
        return {"seed": own, "index": 0, "batch": 1}
    return asdict(own) if isinstance(own, PlacedSeed) else {}
