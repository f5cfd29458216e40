"""The independent oracle end to end: the tiny cascade, converted by us, in diffusers' own pipelines, against our
ONNX runtime. Same prompts, negative prompts, seeds and steps, and a batch of two. test_oracle.py compares the other
features, each beside each, in three steps a stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMWuerstchenScheduler,
    StableCascadeCombinedPipeline,
    StableCascadeDecoderPipeline,
    StableCascadePriorPipeline,
    StableCascadeUNet,
)
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
from numpy.typing import NDArray
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from cascadekit import Cascade
from cascadekit.parity.image_metrics import psnr
from cascadekit.runtime.cascade import Settings
from cascadekit.runtime.sampling.loop import Step
from cascadekit.schemas.sizes import SizePolicy
from cascadekit.schemas.stages import Stage

LATENT_TOLERANCE = 2e-5  # max |difference| over max |latents|; random networks let latents grow to hundreds
IMAGE_PSNR = 100.0  # dB; measured 132 and more

PROMPTS = ["an image of a shiba inu, donning a spacesuit and helmet", "A cat?!  ünïcode 日本"]
NEGATIVES = ["blurry, low quality", "dog"]


@dataclass
class Theirs:
    prior: Any
    decoder: Any


@pytest.fixture(scope="module")
def pipelines(tiny: Path) -> Theirs:
    """Built from components, as the pipeline index cannot load the vqgan in current diffusers."""
    model = tiny / "model"
    common = {
        "tokenizer": CLIPTokenizer.from_pretrained(model / "tokenizer"),
        "text_encoder": CLIPTextModelWithProjection.from_pretrained(model / "text_encoder").eval(),
    }
    prior = StableCascadePriorPipeline(
        prior=StableCascadeUNet.from_pretrained(model / "prior").eval(),
        scheduler=DDPMWuerstchenScheduler.from_pretrained(model / "scheduler"),
        **common,
    )
    decoder = StableCascadeDecoderPipeline(
        decoder=StableCascadeUNet.from_pretrained(model / "decoder").eval(),
        scheduler=DDPMWuerstchenScheduler.from_pretrained(model / "scheduler"),
        vqgan=PaellaVQModel.from_pretrained(model / "vqgan").eval(),
        **common,
    )
    for pipeline in (prior, decoder):
        pipeline.set_progress_bar_config(disable=True)
    return Theirs(prior, decoder)


Tape = dict[str, NDArray[np.float32]]


def run_theirs(
    pipelines: Theirs,
    settings: Settings,
    prompts: Sequence[str],
    negatives: Sequence[str],
    generator: torch.Generator,
) -> tuple[Tape, NDArray[np.float32]]:
    tape: Tape = {}

    def record(stage: Stage) -> Any:
        def callback(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            tape[f"{stage} {index}"] = tensors["latents"].numpy().copy()
            return tensors

        return callback

    text = {"prompt": list(prompts), "negative_prompt": list(negatives), "generator": generator}
    prior = pipelines.prior(
        **text,
        height=settings.height,
        width=settings.width,
        num_inference_steps=settings.prior_steps,
        guidance_scale=settings.prior_guidance,
        callback_on_step_end=record(Stage.PRIOR),
    )
    images = pipelines.decoder(
        prior.image_embeddings,
        **text,
        num_inference_steps=settings.decoder_steps,
        guidance_scale=settings.decoder_guidance,
        output_type="np",
        callback_on_step_end=record(Stage.DECODER),
    ).images
    return tape, images.transpose(0, 3, 1, 2)


CASES = {
    "the steps of the defaults": (Settings(384, 256, 20, 4.0, 10, 1.1), 1234),
    "no guidance": (Settings(256, 128, 3, 1.0, 2, 0.0), 0),
}


@pytest.mark.parametrize(("settings", "seed"), CASES.values(), ids=CASES)
def test_same_latents_and_images(tiny: Path, pipelines: Theirs, settings: Settings, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    expected, their_images = run_theirs(pipelines, settings, PROMPTS, NEGATIVES, generator)
    found: Tape = {}

    def record(stage: Stage, step: Step) -> None:
        found[f"{stage} {step.index}"] = step.latents

    with Cascade.open(tiny / "bundle") as cascade:
        result = cascade.generate(
            PROMPTS,
            negative=NEGATIVES,
            seed=seed,
            settings=settings,
            size_policy=SizePolicy.DIFFUSERS,
            on_step=record,
        )
        images = cascade.pixels(result.decoder_latents)

    assert found.keys() == expected.keys()
    assert len(found) == settings.prior_steps + settings.decoder_steps
    for name, latents in expected.items():
        assert found[name].shape == latents.shape
        error = np.abs(found[name] - latents).max() / np.abs(latents).max()
        assert error <= LATENT_TOLERANCE, name
    assert their_images.shape == images.shape == (2, 3, settings.height, settings.width)
    assert psnr(images, their_images) >= IMAGE_PSNR
    assert 0.05 < images.std() < 0.4  # neither grey nor saturated, where any error would hide
    assert np.abs(images[0] - images[-1]).mean() > 0.01


def test_wrong_settings_would_show(tiny: Path, pipelines: Theirs) -> None:
    """The comparison above can fail: neighbours of the right settings are far off."""
    settings = Settings(128, 128, 2, 4.0, 2, 1.5, SizePolicy.DIFFUSERS)
    _, expected = run_theirs(pipelines, settings, PROMPTS, NEGATIVES, torch.Generator().manual_seed(0))
    with Cascade.open(tiny / "bundle") as cascade:
        for changes in ({"seed": 1}, {"negative": "cat"}, {"decoder_guidance": 1.51}, {"prior_guidance": 4.01}):
            call: dict[str, Any] = {"negative": NEGATIVES, "seed": 0, "settings": settings, **changes}
            found = cascade.pixels(cascade.generate(PROMPTS, **call).decoder_latents)
            assert psnr(found, expected) < IMAGE_PSNR, changes


def test_the_combined_pipeline(tiny: Path, pipelines: Theirs) -> None:
    """Their combined pipeline draws both stages from one generator; so does `generate` with one seed."""
    prior, decoder = pipelines.prior, pipelines.decoder
    combined = StableCascadeCombinedPipeline(
        **{name: decoder.components[name] for name in ("tokenizer", "text_encoder", "decoder", "scheduler", "vqgan")},
        **{f"prior_{name}": prior.components[name] for name in ("prior", "text_encoder", "tokenizer", "scheduler")},
    )
    combined.set_progress_bar_config(disable=True)
    settings = Settings(256, 128, 3, 4.0, 2, 1.5)
    expected = combined(
        PROMPTS[0],
        negative_prompt=NEGATIVES[0],
        height=settings.height,
        width=settings.width,
        prior_num_inference_steps=settings.prior_steps,
        prior_guidance_scale=settings.prior_guidance,
        num_inference_steps=settings.decoder_steps,
        decoder_guidance_scale=settings.decoder_guidance,
        generator=torch.Generator().manual_seed(11),
        output_type="np",
    ).images
    with Cascade.open(tiny / "bundle") as cascade:
        result = cascade.generate(PROMPTS[0], negative=NEGATIVES[0], seed=11, settings=settings)
        images = cascade.pixels(result.decoder_latents)
    assert psnr(images, expected.transpose(0, 3, 1, 2)) >= IMAGE_PSNR
