"""Pictures of the example model by Stability's sampler, transformers' text encoder and diffusers' VQGAN.

The networks of prior and decoder are given, as whatever program read their weights."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from helpers.stability import ddpm

STEPS = (20, 10)
# What `Cascade.generate` takes for the same.
STABILITY: dict[str, Any] = {
    "size_policy": "diffusers",
    "sampler": "gdf",
    "prior_guidance": 4.0,
    "decoder_guidance": 1.1,
    "prior_shift": 2.0,
    "decoder_shift": 1.0,
    "rescale": 0.7,
}

Network = Callable[..., Any]


@torch.no_grad()
def by_stability(
    model: Path,
    prompts: Sequence[str],
    seed: int,
    *,
    prior: Network,
    decoder: Network,
    steps: tuple[int, int] = STEPS,
) -> np.ndarray:
    """(B, 3, 128, 128) in 0..1, with the settings of Stability's notebooks.

    `model` is a diffusers folder, for the text encoder and the VQGAN. The networks are called as those of diffusers,
    and return something with a `sample`."""
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    text_encoder = CLIPTextModelWithProjection.from_pretrained(model / "text_encoder").eval()
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
    effnet = ddpm(in_prior, first, generator, steps=steps[0], cfg=4.0, shift=2.0, rho=0.7).latents[-1]

    def in_decoder(x: torch.Tensor, r: torch.Tensor, conditional: bool) -> torch.Tensor:
        seen, pooled = (effnet, asked[1]) if conditional else (torch.zeros_like(effnet), empty[1])
        found: torch.Tensor = decoder(sample=x, timestep_ratio=r, clip_text_pooled=pooled, effnet=seen).sample
        return found

    first = torch.randn(len(prompts), 4, 32, 32, generator=generator)
    latents = ddpm(in_decoder, first, generator, steps=steps[1], cfg=1.1, shift=1.0, rho=0.7).latents[-1]
    return vqgan.decode(latents * vqgan.config.scale_factor).sample.clamp(0, 1).numpy()
