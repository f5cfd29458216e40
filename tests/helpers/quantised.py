"""Checkpoints with weights that other programs quantised, as tests/data/make_quantised.py recorded them."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cascadekit.schemas.code_types import values_of
from cascadekit.schemas.config_json import to_json
from cascadekit.schemas.quantization import candidates
from cascadekit.schemas.stages import PRESETS, Stage, UNetConfig, Variant, prior_config
from cascadekit.schemas.tensors import expected_tensors
from helpers.standins import Content, write_holes

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
# The programs that wrote what is recorded, with the versions of tests/data/make_quantised.py.
PROGRAMS = {"torchao": "0.18.0", "bitsandbytes": "0.50.2", "sdnq": "0.2.8"}
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


# The same formats at full size, with holes in place of most weights.


def bitsandbytes_nf4(module: str, shape: tuple[int, ...]) -> Content:

    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(shape)}
    text, values = json.dumps(state).encode(), np.array(values_of("NF4"), "<f4")
    weight, count = f"{module}.weight", math.prod(shape)
    return {
        weight: ("U8", (count // 2, 1), b""),
        f"{weight}.absmax": ("F32", (count // 64,), b""),
        f"{weight}.quant_map": ("F32", (16,), values.tobytes()),
        f"{weight}.quant_state.bitsandbytes__nf4": ("U8", (len(text),), text),
    }


def bitsandbytes_int8(module: str, shape: tuple[int, ...]) -> Content:
    return {
        f"{module}.weight": ("I8", shape, b""),
        f"{module}.SCB": ("F32", shape[:1], b""),
        f"{module}.weight_format": ("U8", (), b""),
    }


def torchao_int8(module: str, shape: tuple[int, ...]) -> Content:
    return {
        f"{module}._weight_qdata": ("I8", shape, b""),
        f"{module}._weight_scale": ("F32", (shape[0], 1), b""),
        f"{module}._weight_zero_point": ("I8", (shape[0], 1), b""),
    }


def torchao_entry(shape: tuple[int, ...]) -> dict[str, Any]:
    data = {"block_size": [1, shape[1]], "dtype": {"_type": "torch.dtype", "_data": "bfloat16"}}
    return {"_type": "Int8Tensor", "_data": data, "_tensor_data_names": ["zero_point", "qdata", "scale"]}


FULL: dict[str, tuple[Variant, Callable[[str, tuple[int, ...]], Content]]] = {
    "bitsandbytes_nf4": (Variant.FULL, bitsandbytes_nf4),
    "bitsandbytes_int8": (Variant.LITE, bitsandbytes_int8),
    "torchao_int8": (Variant.LITE, torchao_int8),
}


def full_decoder(name: str, place: Path) -> None:
    """Write the folder of a stage B as a program in FULL would, which takes little disk; 0.7 GB and more."""
    variant, quantised = FULL[name]
    config = PRESETS[Stage.DECODER, variant]
    shapes = expected_tensors(config)
    linears = candidates(Stage.DECODER, shapes)
    content: Content = {key: ("BF16", shape, b"") for key, shape in shapes.items()}
    for module, shape in linears.items():
        del content[f"{module}.weight"]
        content |= quantised(module, shape)
    metadata = {}
    if name.startswith("torchao"):
        entries = {f"{module}.weight": torchao_entry(shape) for module, shape in linears.items()}
        entries |= {key: {"_type": "Tensor"} for key in shapes.keys() - entries.keys()}
        metadata = {key: json.dumps(entry) for key, entry in entries.items()} | {"tensor_names": json.dumps([*shapes])}
    write_decoder(place, config, content, metadata)


def short_decoder(place: Path) -> None:
    """Write the folder of a stage B with layers of real size, but with few of them: 0.74 GB in fp32."""
    lite = PRESETS[Stage.DECODER, Variant.LITE]
    config = replace(lite, down_num_layers_per_block=(1, 1, 3, 1), up_num_layers_per_block=(1, 3, 1, 1))
    write_decoder(place, config, {key: ("F32", shape, b"") for key, shape in expected_tensors(config).items()}, {})


def write_decoder(place: Path, config: UNetConfig, content: Content, metadata: dict[str, str]) -> None:
    place.mkdir()
    (place / "config.json").write_text(json.dumps(to_json(config)))
    write_holes(place / "diffusion_pytorch_model.safetensors", content, metadata)
