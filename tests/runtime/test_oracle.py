"""diffusers' pipelines as the oracle of every feature they share with ours, each beside each: guidance in either
stage, batches, image prompts, own latents, lite stages, embeddings in and out, timestep lists, callbacks.

Same weights, same seeds. Every step's latents are compared and the images they end in.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cascadekit import Cascade, Settings
from cascadekit.parity.image_metrics import psnr
from cascadekit.runtime.sampling.loop import Step
from cascadekit.runtime.text.prompts import PromptEmbeds
from cascadekit.schemas.sizes import SizePolicy
from cascadekit.schemas.stages import Stage
from helpers.whole import Whole, picture

F32 = NDArray[np.float32]
Tape = dict[str, F32]

LATENT_TOLERANCE = 2e-5  # greatest |difference| over greatest |latent|, at every step; 4e-6 is found
IMAGE_PSNR = 100.0  # dB; 133 and more are found

PROMPTS = ["an image of a shiba inu, donning a spacesuit and helmet", "A cat?!  ünïcode 日本"]
NEGATIVES = ["blurry, low quality", "dog"]
IRREGULAR = (0.9, 0.62, 0.6, 0.11)  # does not begin at 1, does not end at 0
TO_ZERO = (1.0, 0.41, 0.4, 0.0)


@dataclass(frozen=True)
class Case:
    prompts: int = 1
    images: int = 1  # for each prompt
    negative: str | tuple[str, ...] | None = None
    guidance: tuple[float, float] = (4.0, 0.0)
    prompt_pictures: int = 0
    prompt_embeds: int = 0  # image prompts as embeddings
    own_latents: bool = False
    lite: frozenset[Stage] = frozenset()
    encoded: bool = False  # prompts as embeddings
    timesteps: tuple[float, ...] = ()
    edits: bool = False  # latents, at the end of steps
    seed: int | tuple[int, ...] = 7
    size: tuple[int, int] = (256, 128)  # height, width


PRIOR, DECODER, VQGAN = (frozenset({stage}) for stage in (Stage.PRIOR, Stage.DECODER, Stage.VQGAN))

CASES = {
    "one of each": Case(negative="dog", guidance=(4.0, 1.5), prompt_pictures=1, edits=True, timesteps=TO_ZERO),
    "no guidance, image prompts, own latents": Case(
        2, guidance=(1.0, 0.0), prompt_pictures=3, own_latents=True, lite=PRIOR, timesteps=IRREGULAR
    ),
    "images of a batch with one seed": Case(
        2, 3, tuple(NEGATIVES), (8.0, 2.0), prompt_pictures=2, lite=DECODER, own_latents=True, size=(128, 128)
    ),
    "images of a batch with a seed each": Case(
        2, 2, tuple(NEGATIVES), (3.0, 0.0), prompt_embeds=2, edits=True, seed=(5, 6, 5, 9), size=(128, 128)
    ),
    "embedded prompts": Case(2, 1, tuple(NEGATIVES), (4.0, 1.2), encoded=True, lite=PRIOR | DECODER | VQGAN),
    "embedded prompts, several images, embedded pictures": Case(
        1, 2, "dog", (2.5, 0.0), encoded=True, prompt_embeds=1, timesteps=IRREGULAR, own_latents=True, edits=True
    ),
    "guidance in the decoder alone": Case(2, 1, tuple(NEGATIVES), (1.0, 3.0), lite=VQGAN, edits=True, size=(128, 256)),
    "no negative prompt": Case(2, 1, None, (5.0, 1.1), lite=PRIOR, prompt_embeds=4, timesteps=TO_ZERO, seed=(1, 2)),
    "lite decoder, wide": Case(1, 1, "", (4.0, 0.0), lite=DECODER | VQGAN, edits=True, size=(128, 384)),
}


def edited(latents: Any, index: int) -> Any:
    """The latents as both callbacks change them, at every step but the second."""
    return latents if index == 1 else latents * 0.75 + 0.5


@dataclass
class Side:
    """The results of one side."""

    tape: Tape
    prior: F32
    images: F32


def theirs(whole: Whole, case: Case, pictures: Sequence[Any], image_embeds: F32 | None, latents: F32 | None) -> Side:
    prior, decoder = whole.pipelines(case.lite)
    tape: Tape = {}
    for pipeline in (prior, decoder) if case.timesteps else ():
        _put_timesteps(pipeline.scheduler, case.timesteps)

    def callback(stage: Stage) -> Any:
        def at_end(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if case.edits:
                tensors["latents"] = edited(tensors["latents"], index)
            tape[f"{stage} {index}"] = tensors["latents"].numpy().copy()
            return tensors

        return at_end

    generator: Any = (
        torch.Generator().manual_seed(case.seed)
        if isinstance(case.seed, int)
        else [torch.Generator().manual_seed(seed) for seed in case.seed]
    )
    prompts = PROMPTS[: case.prompts]
    negatives = None if case.negative is None else _each(case.negative, case.prompts)
    text: dict[str, Any] = {"prompt": prompts, "negative_prompt": negatives}
    if case.encoded:
        names = ("prompt_embeds", "prompt_embeds_pooled", "negative_prompt_embeds", "negative_prompt_embeds_pooled")
        text = dict(zip(names, prior.encode_prompt("cpu", case.prompts, 1, True, prompts, negatives), strict=True))
    made = prior(
        **text,
        generator=generator,
        images=list(pictures) or None,
        image_embeds=None if image_embeds is None else torch.from_numpy(image_embeds),
        latents=None if latents is None else torch.from_numpy(latents),
        height=case.size[0],
        width=case.size[1],
        num_inference_steps=3,
        guidance_scale=case.guidance[0],
        num_images_per_prompt=case.images,
        callback_on_step_end=callback(Stage.PRIOR),
    )
    # With guidance their decoder cannot repeat embeddings itself, and it repeats none that are given.
    repeated = {
        name: value if value is None or isinstance(value, str) else [one for one in value for _ in range(case.images)]
        for name, value in text.items()
    }
    if case.encoded:
        repeated = {name: torch.stack(values) for name, values in repeated.items()}
    images = decoder(
        made.image_embeddings,
        **repeated,
        generator=generator,
        num_inference_steps=3,
        guidance_scale=case.guidance[1],
        output_type="np",
        callback_on_step_end=callback(Stage.DECODER),
    ).images
    return Side(tape, made.image_embeddings.numpy(), images.transpose(0, 3, 1, 2))


def ours(whole: Whole, case: Case, pictures: Sequence[Any], image_embeds: F32 | None, latents: F32 | None) -> Side:
    tape: Tape = {}

    def on_step(stage: Stage, step: Step) -> None:
        if case.edits:
            step.latents = edited(step.latents, step.index)
        tape[f"{stage} {step.index}"] = step.latents

    prompts = PROMPTS[: case.prompts]
    negatives = _each(case.negative or "", case.prompts)
    settings = Settings(
        width=case.size[1],
        height=case.size[0],
        prior_steps=3,
        decoder_steps=3,
        prior_guidance=case.guidance[0],
        decoder_guidance=case.guidance[1],
        size_policy=SizePolicy.DIFFUSERS,
        prior_timesteps=case.timesteps,
        decoder_timesteps=case.timesteps,
    )
    cascade = opened(whole, case.lite)
    text: dict[str, Any] = {"prompt": prompts, "negative": negatives}
    if case.encoded:
        text = {"embeds": cascade.encode_prompt(prompts, negatives)}
    result = cascade.generate(
        **text,
        num_images=case.images,
        seed=case.seed,
        settings=settings,
        image_prompts=pictures,
        image_embeds=image_embeds,
        latents=latents,
        on_step=on_step,
    )
    assert result.pixels is not None
    return Side(tape, result.prior_latents, result.pixels)


@cache
def opened(whole: Whole, lite: frozenset[Stage] = frozenset()) -> Cascade:
    return Cascade.open(whole.bundle, threads=1, stages=dict.fromkeys(lite, whole.lite))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_same_latents_at_every_step_and_same_images(whole: Whole, case: Case) -> None:
    rng = np.random.default_rng(3)
    pictures = [picture(90 + 31 * number, 140 - 23 * number, number) for number in range(case.prompt_pictures)]
    shape = (case.prompts * case.images, 16, *(-(-100 * side // 4267) for side in case.size))
    latents = rng.standard_normal(shape, np.float32) if case.own_latents else None
    embeds = rng.standard_normal((1, case.prompt_embeds, 768), np.float32) if case.prompt_embeds else None
    expected = theirs(whole, case, pictures, embeds, latents)
    found = ours(whole, case, pictures, embeds, latents)
    assert found.tape.keys() == expected.tape.keys()
    assert len(found.tape) == 6
    for name, values in expected.tape.items():
        assert found.tape[name].shape == values.shape
        assert np.abs(found.tape[name] - values).max() <= LATENT_TOLERANCE * np.abs(values).max(), name
    assert np.array_equal(found.prior, found.tape[f"{Stage.PRIOR} 2"])
    assert found.images.shape == expected.images.shape
    assert psnr(found.images, expected.images) >= IMAGE_PSNR
    assert found.images.std() > 0.03  # no grey, where errors would not show


def test_every_condition_matters(whole: Whole) -> None:
    """The comparison above can fail: leave one thing out, and latents differ by far more than its tolerance."""
    case = Case(negative="dog", guidance=(4.0, 1.5), prompt_pictures=2, lite=PRIOR)
    rng = np.random.default_rng(0)
    pictures = [picture(100, 80, seed) for seed in range(2)]
    latents = rng.standard_normal((1, 16, 6, 3), np.float32)
    right = ours(whole, case, pictures, None, latents)
    changes = {
        "negative": (replace(case, negative=None), pictures, latents),
        "one picture of two": (case, pictures[:1], latents),
        "own latents": (case, pictures, None),
        "seed": (replace(case, seed=8), pictures, latents),
        "decoder guidance": (replace(case, guidance=(4.0, 1.51)), pictures, latents),
        "timesteps": (replace(case, timesteps=TO_ZERO), pictures, latents),
    }
    for what, (changed, shown, first) in changes.items():
        wrong = ours(whole, changed, shown, None, first)
        scale = np.abs(right.tape[f"{Stage.DECODER} 2"]).max()
        difference = np.abs(wrong.tape[f"{Stage.DECODER} 2"] - right.tape[f"{Stage.DECODER} 2"]).max()
        assert difference > 10 * LATENT_TOLERANCE * scale, what


def test_latents_alone(whole: Whole) -> None:
    """Each output runs the stages that it needs, no more; the latents of a prior go on in a decoder of one's own."""
    case = Case(2, guidance=(4.0, 0.0))
    expected = theirs(whole, case, [], None, None)
    settings = Settings(128, 256, prior_steps=3, decoder_steps=3, size_policy=SizePolicy.DIFFUSERS)
    cascade = opened(whole)
    prior = cascade.generate(PROMPTS, seed=7, settings=settings, output="prior")
    latents = cascade.generate(PROMPTS, seed=7, settings=settings, output="latents")
    assert prior.decoder_latents is None
    assert prior.pixels is None
    assert latents.pixels is None
    assert latents.decoder_latents is not None
    for found, name in ((prior.prior_latents, "prior 2"), (latents.decoder_latents, "decoder 2")):
        assert np.abs(found - expected.tape[name]).max() <= LATENT_TOLERANCE * np.abs(expected.tape[name]).max()


def test_embeddings_equal_theirs(whole: Whole) -> None:
    """Prompts and image prompts embedded by the pipelines, before any sampling."""
    prior, _ = whole.pipelines()
    pictures = [picture(90, 140), picture(200, 60, 1), picture(57, 57, 2)]
    text = prior.encode_prompt("cpu", 2, 1, True, PROMPTS, NEGATIVES)
    with torch.no_grad():
        images, _ = prior.encode_image(pictures, "cpu", torch.float32, 1, 1)
    cascade = opened(whole)
    pairs = zip(_arrays(cascade.encode_prompt(PROMPTS, NEGATIVES)), text, strict=True)
    for mine, their in (*pairs, (cascade.encode_images(pictures), images)):
        assert mine.shape == their.shape
        np.testing.assert_allclose(mine, their.detach().numpy(), rtol=1e-4, atol=1e-4)


def _arrays(embeds: PromptEmbeds) -> tuple[F32, ...]:
    return embeds.clip_text, embeds.pooled, embeds.negative_clip_text, embeds.negative_pooled


def _each(text: str | tuple[str, ...], count: int) -> list[str]:
    return [text] * count if isinstance(text, str) else list(text)


def _put_timesteps(scheduler: Any, ratios: tuple[float, ...]) -> None:
    """Their pipelines take lists of timesteps and ignore them; the scheduler is made to give them out."""

    def set_timesteps(*_: Any, **__: Any) -> None:
        scheduler.timesteps = torch.tensor(ratios)

    scheduler.set_timesteps = set_timesteps
