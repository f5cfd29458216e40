"""Runs ComfyUI's own code in a process of its own, as it takes over torch and the command line.

python -m foreign.comfyui_alone MODEL JOBS"""

import sys
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import MagicMock

import torch
import transformers  # noqa: F401 - before there is a torchvision to be found
from safetensors import safe_open
from safetensors.torch import load_file

from foreign.jobs import run_jobs, settings_of

ARGUMENTS, sys.argv = sys.argv[1:], [sys.argv[0], "--cpu"]
# Imported by networks for other models, and by nothing that runs here.
sys.modules |= {
    name: MagicMock() for name in ("torchaudio", "torchvision", "torchvision.ops", "torchvision.transforms")
}

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.lora  # noqa: E402
import comfy.lora_convert  # noqa: E402
import comfy.model_base  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.utils  # noqa: E402

QUANTISED = (".weight_scale", ".weight_scale_2", ".input_scale", ".comfy_quant")
PREFIX = "model.diffusion_model."  # as comfy/sd.py has it for checkpoints


def loaded(file: Path, folder: Path, lora: Path | None) -> torch.nn.Module:
    """The network that ComfyUI makes of a checkpoint, or of a file with a network alone, and of a LoRA."""
    kinds = {"prior": comfy.supported_models.Stable_Cascade_C, "decoder": comfy.supported_models.Stable_Cascade_B}
    config = kinds[folder.name](settings_of(folder))
    tensors = load_file(file)
    prefix = PREFIX if any(name.startswith(PREFIX) for name in tensors) else ""
    with safe_open(file, "pt") as opened:
        tensors, _ = comfy.utils.convert_old_quants(tensors, prefix, metadata=opened.metadata())
    config.quant_config = comfy.utils.detect_layer_quantization(tensors, prefix)
    config.set_inference_dtype(torch.float32, torch.float32 if config.quant_config else None)
    model = config.get_model(tensors)
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    wanted = weights(config.process_unet_state_dict(own))
    model.load_model_weights(tensors, prefix)
    assert weights(model.diffusion_model.state_dict()) == wanted
    if lora:
        merge(model, lora)
    return model.diffusion_model


def weights(tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """The names of tensors that are no scales and no description of a quantised layer."""
    return {name for name in tensors if not name.endswith(QUANTISED)}


def merge(model: comfy.model_base.BaseModel, file: Path) -> None:
    """As comfy/sd.py's load_lora_for_models; every patch must fit."""
    keys = comfy.lora.model_lora_keys_unet(model, {})
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(load_file(file)), keys)
    weights = model.state_dict()
    assert patches
    for key, patch in patches.items():
        weights[key].copy_(comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)], weights[key].clone(), key))


if __name__ == "__main__":
    run_jobs(*map(Path, ARGUMENTS), loaded)
