"""Checkpoints with weights that other programs quantised, as tests/data/make_quantised.py recorded them."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cascadekit.schemas.config_json import to_json
from cascadekit.schemas.stages import prior_config
from cascadekit.schemas.tensors import expected_tensors

SAVED = Path(__file__).parents[1] / "data" / "quantised_folders"  # whole folders, by make_quantised_folders.py
FOLDER = Path(__file__).parents[1] / "data" / "quantised"
CONFIG = replace(
    prior_config((12, 16), (2, 2), (1, 1), text=39, pooled=10, image=5),
    conditioning_dim=21,
    clip_seq=4,
    timestep_ratio_embedding_dim=6,
)
# SDNQ packs whole groups of 8 values, the others an odd number of values too.
SHAPES = {"clip_txt_mapper": (21, 39), "down_blocks.0.0.channelwise.4": (12, 48), "clip_txt_pooled_mapper": (84, 10)}
ODD, EVEN = (
    ("clip_txt_mapper", "down_blocks.0.0.channelwise.4"),
    ("clip_txt_pooled_mapper", "down_blocks.0.0.channelwise.4"),
)
Tensors = dict[str, torch.Tensor]


def linears(dtype: torch.dtype, names: tuple[str, ...] = ODD) -> torch.nn.ModuleDict:
    """Linears with random weights; one value in each is large."""
    generator = torch.Generator().manual_seed(3)
    layers = {}
    for name in names:
        rows, columns = SHAPES[name]
        layer = torch.nn.Linear(columns, rows)
        layer.weight.data = torch.randn(rows, columns, generator=generator) * 0.05
        layer.weight.data[rows // 2, columns // 3] = 0.7
        layer.bias.data = torch.randn(rows, generator=generator)
        layers[name.replace(".", "/")] = layer.to(dtype)
    return torch.nn.ModuleDict(layers)


def tensor_sha256(tensor: torch.Tensor) -> str:
    """The SHA-256 of dtype, shape and values; a zero has no sign."""
    values = (tensor.detach() + 0.0).contiguous().cpu()
    described = f"{values.dtype} {list(values.shape)} ".encode()
    return hashlib.sha256(described + values.view(torch.uint8).numpy().tobytes()).hexdigest()


def names() -> list[str]:
    """The formats that are recorded."""
    return sorted(path.name.removesuffix(".values.safetensors") for path in FOLDER.glob("*.values.safetensors"))


def recorded(name: str) -> tuple[Tensors, dict[str, str], Tensors]:
    """The tensors of a format as its program saved them, their metadata, and the values of the weights."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        metadata = file.metadata() or {}
    return load_file(FOLDER / f"{name}.safetensors"), metadata, load_file(FOLDER / f"{name}.values.safetensors")


def folder(name: str, place: Path) -> Tensors:
    """Write the folder of a prior with recorded weights among random ones; return what all of its tensors are worth."""
    stored, metadata, values = recorded(name)
    generator = torch.Generator().manual_seed(0)
    plain = {
        key: torch.randn(shape, generator=generator).to(torch.bfloat16)
        for key, shape in expected_tensors(CONFIG).items()
        if key not in values
    }
    biases = {key: tensor for key, tensor in stored.items() if key.endswith(".bias")}
    config: dict[str, Any] = to_json(CONFIG)
    if (FOLDER / f"{name}.json").exists():
        config["quantization_config"] = json.loads((FOLDER / f"{name}.json").read_text())
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(config))
    save_file(plain | stored, place / "diffusion_pytorch_model.safetensors", metadata)
    return plain | biases | values
