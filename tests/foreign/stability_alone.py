"""Runs the networks and the LoRA class of Stability's own repository, in a process of its own.

python -m foreign.stability_alone MODEL JOBS"""

import sys
from pathlib import Path
from unittest.mock import MagicMock

import torch
from safetensors.torch import load_file

from foreign.jobs import run_jobs, settings_of

# Imported by the package for other networks, with many requirements.
sys.modules |= {name: MagicMock() for name in ("modules.effnet", "modules.controlnet")}

from modules.lora import LoRA, apply_lora  # noqa: E402
from modules.stage_b import StageB  # noqa: E402
from modules.stage_c import StageC  # noqa: E402

FILTERS = [".attn"]  # configs/training/finetune_c_3b_lora.yaml: module_filters


def loaded(file: Path, folder: Path, lora: Path | None) -> torch.nn.Module:
    network: torch.nn.Module = {"prior": StageC, "decoder": StageB}[folder.name](**settings_of(folder))
    network.load_state_dict(load_file(file))
    if lora:
        apply(network, lora)
    return network.eval().requires_grad_(False)


def apply(network: torch.nn.Module, file: Path) -> None:
    """As train/train_c_lora.py makes and loads it."""
    tensors = load_file(file)
    apply_lora(network, filters=FILTERS, rank=len(tensors["weights.0.lora_down"]))
    lora = torch.nn.ModuleDict({"weights": torch.nn.ModuleList(m for m in network.modules() if isinstance(m, LoRA))})
    lora.load_state_dict(tensors)


if __name__ == "__main__":
    run_jobs(Path(sys.argv[1]), Path(sys.argv[2]), loaded)
