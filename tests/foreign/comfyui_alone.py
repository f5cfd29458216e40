"""Runs ComfyUI's own code in a process of its own, as it takes over torch and the command line.

python -m foreign.comfyui_alone MODEL JOBS

JOBS is a JSON file with a list. Each job has the paths `prior`, `decoder` and, for a LoRA, `lora`; its pictures become
the file `out`."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import torch
import transformers  # noqa: F401 - before there is a torchvision to be found
from diffusers import StableCascadeUNet
from safetensors.torch import load_file

from helpers.format_pictures import PROMPTS, SEED
from helpers.stability_pictures import by_stability

ARGUMENTS, sys.argv = sys.argv[1:], [sys.argv[0], "--cpu"]
# Imported by networks for other models, and by nothing that runs here.
sys.modules |= {name: MagicMock() for name in ("torchaudio", "torchvision", "torchvision.transforms")}

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.lora  # noqa: E402
import comfy.lora_convert  # noqa: E402
import comfy.model_base  # noqa: E402
import comfy.supported_models  # noqa: E402

PREFIX = "model.diffusion_model."  # as comfy/sd.py has it for checkpoints
LETTERS = {"SDCascadeResBlock": "C", "SDCascadeTimestepBlock": "T", "SDCascadeAttnBlock": "A"}


def settings_of(folder: Path) -> dict[str, object]:
    """The arguments of ComfyUI's StageC or StageB for a network of diffusers. Its loader knows the released sizes."""
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


def loaded(file: Path, folder: Path) -> comfy.model_base.BaseModel:
    """The model that ComfyUI makes of a checkpoint, or of a file with a network alone."""
    kinds = {"prior": comfy.supported_models.Stable_Cascade_C, "decoder": comfy.supported_models.Stable_Cascade_B}
    config = kinds[folder.name](settings_of(folder))
    config.set_inference_dtype(torch.float32, None)
    tensors = load_file(file)
    prefix = PREFIX if any(name.startswith(PREFIX) for name in tensors) else ""
    model = config.get_model(tensors)
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    assert config.process_unet_state_dict(own).keys() == model.diffusion_model.state_dict().keys()
    return model.load_model_weights(tensors, prefix)


def with_lora(model: comfy.model_base.BaseModel, file: Path) -> None:
    """As comfy/sd.py's load_lora_for_models; every patch must fit."""
    keys = comfy.lora.model_lora_keys_unet(model, {})
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(load_file(file)), keys)
    weights = model.state_dict()
    assert patches
    for key, patch in patches.items():
        weights[key].copy_(comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)], weights[key].clone(), key))


def pictures(model: Path, job: dict[str, str]) -> np.ndarray:
    """The pictures of Stability's sampler and ComfyUI's networks."""
    first, second = (loaded(Path(job[stage]), model / stage) for stage in ("prior", "decoder"))
    if "lora" in job:
        with_lora(first, Path(job["lora"]))

    def in_prior(sample: torch.Tensor, timestep_ratio: torch.Tensor, **text: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=first.diffusion_model(sample, timestep_ratio, **text))

    def in_decoder(
        sample: torch.Tensor, timestep_ratio: torch.Tensor, effnet: torch.Tensor, clip_text_pooled: torch.Tensor
    ) -> SimpleNamespace:
        return SimpleNamespace(sample=second.diffusion_model(sample, timestep_ratio, effnet, clip_text_pooled))

    return by_stability(model, PROMPTS, SEED, prior=in_prior, decoder=in_decoder)


if __name__ == "__main__":
    MODEL, JOBS = map(Path, ARGUMENTS)
    for each in json.loads(JOBS.read_text()):
        np.save(each["out"], pictures(MODEL, each))
