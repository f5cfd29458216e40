"""diffusers' pipelines and Stability's sampler generate the pictures that our runtime generates, from the example
model's files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMWuerstchenScheduler,
    StableCascadeDecoderPipeline,
    StableCascadePriorPipeline,
    StableCascadeUNet,
)
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from cascadekit import Cascade, convert, export
from cascadekit.converters.checkpoints.example_model import EXAMPLE_MODEL
from cascadekit.parity.image_metrics import psnr
from helpers.stability_pictures import STABILITY, by_stability

PROMPTS = ["a strawberry, glossy style", "a red heart above a blue square"]
LEAST_PSNR = 50.0  # dB


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diffusers") / "model"
    convert([EXAMPLE_MODEL], folder, "diffusers", dtype="fp32")
    return folder


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bundle") / "bundle"
    export(model, made)
    return made


def by_diffusers(model: Path, prompts: Sequence[str], seed: int) -> np.ndarray:
    """(B, 3, 128, 128) in 0..1, with the defaults of both pipelines."""
    common = {
        "tokenizer": CLIPTokenizer.from_pretrained(model / "tokenizer"),
        "text_encoder": CLIPTextModelWithProjection.from_pretrained(model / "text_encoder").eval(),
    }
    scheduler = DDPMWuerstchenScheduler.from_pretrained(model / "scheduler")
    prior = StableCascadePriorPipeline(
        prior=StableCascadeUNet.from_pretrained(model / "prior").eval(), scheduler=scheduler, **common
    )
    decoder = StableCascadeDecoderPipeline(
        decoder=StableCascadeUNet.from_pretrained(model / "decoder").eval(),
        vqgan=PaellaVQModel.from_pretrained(model / "vqgan").eval(),
        scheduler=scheduler,
        **common,
    )
    for pipeline in (prior, decoder):
        pipeline.set_progress_bar_config(disable=True)
    text = {"prompt": list(prompts), "generator": torch.Generator().manual_seed(seed)}
    found = prior(**text, height=128, width=128, num_inference_steps=20, guidance_scale=4.0)
    images = decoder(
        found.image_embeddings, **text, num_inference_steps=10, guidance_scale=0.0, output_type="np"
    ).images
    return np.asarray(images.transpose(0, 3, 1, 2))


def test_the_same_pictures_by_the_pipelines_of_diffusers(model: Path, bundle: Path) -> None:
    with Cascade.open(bundle) as cascade:
        ours = cascade.generate(PROMPTS, seed=11, size_policy="diffusers").pixels
    theirs = by_diffusers(model, PROMPTS, 11)
    assert ours is not None
    assert psnr(ours, theirs) >= LEAST_PSNR


def test_the_same_pictures_by_the_sampler_of_stability(model: Path, bundle: Path) -> None:
    with Cascade.open(bundle) as cascade:
        ours = cascade.generate(PROMPTS, seed=11, **STABILITY).pixels
    assert ours is not None
    prior, decoder = (StableCascadeUNet.from_pretrained(model / stage).eval() for stage in ("prior", "decoder"))
    assert psnr(ours, by_stability(model, PROMPTS, 11, prior=prior, decoder=decoder)) >= LEAST_PSNR
