"""Pictures by networks of programs that are no packages, in the process that imported them.

A job has the paths `prior` and `decoder`, for a LoRA also `lora`, and `out`, which the pictures become."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import StableCascadeUNet

from helpers.format_pictures import PROMPTS, SEED
from helpers.stability_pictures import by_stability

LETTERS = {"SDCascadeResBlock": "C", "SDCascadeTimestepBlock": "T", "SDCascadeAttnBlock": "A"}


def settings_of(folder: Path) -> dict[str, Any]:
    """The arguments of Stability's classes StageC and StageB, which ComfyUI has too, for a network of diffusers."""
    config = StableCascadeUNet.load_config(folder)
    pooled = config["clip_text_pooled_in_channels"]
    settings = {
        "c_cond": config["conditioning_dim"],
        "c_hidden": config["block_out_channels"],
        "nhead": config["num_attention_heads"],
        "blocks": [config["down_num_layers_per_block"], config["up_num_layers_per_block"]],
        "block_repeat": [config["down_blocks_repeat_mappers"], config["up_blocks_repeat_mappers"]],
        "level_config": ["".join(map(LETTERS.__getitem__, level)) for level in config["block_types_per_layer"]],
    }
    if config["clip_text_in_channels"] is None:
        return settings | {"c_clip": pooled}
    text, image = config["clip_text_in_channels"], config["clip_image_in_channels"]
    return settings | {"c_clip_text": text, "c_clip_text_pooled": pooled, "c_clip_img": image}


def run_jobs(model: Path, jobs: Path, load: Callable[[Path, Path, Path | None], torch.nn.Module]) -> None:
    """Do the jobs in a JSON file. `load` makes a network of its file, diffusers' folder with its config, and a LoRA."""
    for job in json.loads(jobs.read_text()):
        lora = Path(job["lora"]) if "lora" in job else None
        prior = load(Path(job["prior"]), model / "prior", lora)
        decoder = load(Path(job["decoder"]), model / "decoder", None)
        np.save(job["out"], pictures(model, prior, decoder))


def pictures(model: Path, prior: torch.nn.Module, decoder: torch.nn.Module) -> np.ndarray:
    def in_prior(sample: torch.Tensor, timestep_ratio: torch.Tensor, **text: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=prior(sample, timestep_ratio, **text))

    def in_decoder(
        sample: torch.Tensor, timestep_ratio: torch.Tensor, effnet: torch.Tensor, clip_text_pooled: torch.Tensor
    ) -> SimpleNamespace:
        return SimpleNamespace(sample=decoder(sample, timestep_ratio, effnet, clip_text_pooled))

    return by_stability(model, PROMPTS, SEED, prior=in_prior, decoder=in_decoder)
