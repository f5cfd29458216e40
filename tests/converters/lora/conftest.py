"""A tiny prior and text encoder in every layout, and LoRA files written key by key, as their trainers would."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cascadekit.converters.lora.merge_checkpoint import merge_loras
from cascadekit.schemas.stages import PRESETS, Stage, Variant
from cascadekit.schemas.tensors import expected_tensors

Tensors = dict[str, torch.Tensor]

BLOCKS = ("down_blocks.0.2", "down_blocks.1.2", "up_blocks.0.2", "up_blocks.1.2")
JOINED = ("to_q", "to_k", "to_v")


def random(seed: int, *shape: int) -> torch.Tensor:
    """Multiples of 1/8 below 1: products and sums of a few dozen are exact in float32."""
    return torch.randint(-7, 8, shape, generator=torch.Generator().manual_seed(seed)).float() / 8


def to_original(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Stability's names: q, k and v as the rows of one tensor."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        if ".to_q." in name:
            parts = [tensors[name.replace("to_q", part)] for part in JOINED]
            result[name.replace("to_q.", "attn.in_proj_")] = torch.cat(parts)
        elif ".to_out.0." in name:
            result[name.replace("to_out.0.", "attn.out_proj.")] = tensor
        elif ".to_k." not in name and ".to_v." not in name:
            result[name] = tensor
    return result


def to_diffusers(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    result: Tensors = {}
    for name, tensor in tensors.items():
        if "attn.in_proj_" in name:
            for part, rows in zip(JOINED, tensor.chunk(3), strict=True):
                result[name.replace("attn.in_proj_", f"{part}.")] = rows
        else:
            result[name.replace("attn.out_proj.", "to_out.0.")] = tensor
    return result


class Bench:
    """Writes checkpoints and LoRA files below a folder, and merges them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.weights = self._weights(Stage.PRIOR)
        self.text_weights = self._weights(Stage.TEXT_ENCODER)
        self._count = 0

    def _weights(self, stage: Stage) -> Tensors:
        shapes = expected_tensors(PRESETS[stage, Variant.TINY])
        return {name: random(seed, *shape) + 0.0625 for seed, (name, shape) in enumerate(shapes.items())}

    def path(self, name: str) -> Path:
        self._count += 1
        return self.folder / f"{self._count}_{name}.safetensors"

    def checkpoint(self, layout: str = "original", dtype: torch.dtype = torch.float32, weights: Any = None) -> Path:
        tensors = {name: tensor.to(dtype).contiguous() for name, tensor in (weights or self.weights).items()}
        path = self.path(f"prior_{layout}")
        save_file(to_original(tensors) if layout == "original" else tensors, path, {"format": "pt", "kept": "yes"})
        return path

    def text_encoder(self) -> Path:
        path = self.path("text_encoder")
        save_file(self.text_weights, path)
        return path

    def lora(self, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
        path = self.path("lora")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
        return path

    def merge(self, checkpoint: Path, loras: Sequence[Path], **options: Any) -> Tensors:
        """The merged weights by diffusers names."""
        output = self.path("merged")
        merge_loras(checkpoint, loras, output, **options)
        return to_diffusers(load_file(output))

    def check(
        self,
        lora: Path,
        expected: Mapping[str, torch.Tensor],
        tolerance: float = 0,
        layout: str = "original",
        **options: Any,
    ) -> None:
        """Merging `lora` changes the modules in `expected` to those weights and no other tensor."""
        merged = self.merge(self.checkpoint(layout), [lora], **options)
        assert merged.keys() == self.weights.keys()
        for name, tensor in merged.items():
            want = expected.get(name.removesuffix(".weight"), self.weights[name]) if name.endswith("weight") else None
            want = self.weights[name] if want is None else want
            torch.testing.assert_close(
                tensor, want.to(tensor.dtype), rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
def numbers() -> Callable[..., torch.Tensor]:
    return random


@pytest.fixture
def blocks() -> tuple[str, ...]:
    return BLOCKS
