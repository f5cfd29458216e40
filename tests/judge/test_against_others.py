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
from helpers.stability import ddpm

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


@torch.no_grad()
def by_stability(model: Path, prompts: Sequence[str], seed: int) -> np.ndarray:
    """(B, 3, 128, 128) in 0..1, with the settings of Stability's notebooks and the networks of diffusers."""
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    text_encoder = CLIPTextModelWithProjection.from_pretrained(model / "text_encoder").eval()
    prior, decoder = (StableCascadeUNet.from_pretrained(model / stage).eval() for stage in ("prior", "decoder"))
    vqgan = PaellaVQModel.from_pretrained(model / "vqgan").eval()

    def encoded(texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
        found = text_encoder(**tokens, output_hidden_states=True)
        return found.hidden_states[-1], found.text_embeds.unsqueeze(1)

    asked, empty = encoded(prompts), encoded([""] * len(prompts))
    generator = torch.Generator().manual_seed(seed)

    def in_prior(x: torch.Tensor, r: torch.Tensor, conditional: bool) -> torch.Tensor:
        hidden, pooled = asked if conditional else empty
        text = {"clip_text": hidden, "clip_text_pooled": pooled, "clip_img": torch.zeros(len(x), 1, 64)}
        found: torch.Tensor = prior(sample=x, timestep_ratio=r, **text).sample
        return found

    first = torch.randn(len(prompts), 16, 3, 3, generator=generator)
    effnet = ddpm(in_prior, first, generator, steps=20, cfg=4.0, shift=2.0, rho=0.7).latents[-1]

    def in_decoder(x: torch.Tensor, r: torch.Tensor, conditional: bool) -> torch.Tensor:
        seen, pooled = (effnet, asked[1]) if conditional else (torch.zeros_like(effnet), empty[1])
        found: torch.Tensor = decoder(sample=x, timestep_ratio=r, clip_text_pooled=pooled, effnet=seen).sample
        return found

    first = torch.randn(len(prompts), 4, 32, 32, generator=generator)
    latents = ddpm(in_decoder, first, generator, steps=10, cfg=1.1, shift=1.0, rho=0.7).latents[-1]
    return vqgan.decode(latents * vqgan.config.scale_factor).sample.clamp(0, 1).numpy()


def test_the_same_pictures_by_the_sampler_of_stability(model: Path, bundle: Path) -> None:
    with Cascade.open(bundle) as cascade:
        ours = cascade.generate(
            PROMPTS,
            seed=11,
            size_policy="diffusers",
            sampler="gdf",
            prior_guidance=4.0,
            decoder_guidance=1.1,
            prior_shift=2.0,
            decoder_shift=1.0,
            rescale=0.7,
        ).pixels
    assert ours is not None
    assert psnr(ours, by_stability(model, PROMPTS, 11)) >= LEAST_PSNR
