"""The tiny cascade: every stage in the original layout, about a million weights in all, the same on every machine.

Its weights are random, so that its images show nothing. The prior and the decoder denoise nothing, and latents grow to
some hundreds along a trajectory. The vqgan is scaled to such latents: its images stay clear of black and white, where
errors would not show.
"""

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...schemas.folders import ORIGINAL_NAMES
from ...schemas.layouts import Layout, to_diffusers
from ...schemas.stages import PRESETS, NetworkConfig, Stage, Variant
from ...schemas.tensors import Shape, expected_tensors, is_counter
from ...storage.safetensors_plan import TensorPlan
from ...storage.safetensors_writer import write_safetensors
from .constant_values import constant
from .model_folder import write_folder_files

TINY_STAGES = (Stage.PRIOR, Stage.DECODER, Stage.VQGAN)

LATENTS_NEAR = np.float32(100)  # the size of latents after 20 + 10 steps of random networks

Tensors = dict[str, NDArray[np.float32]]


def write_tiny_cascade(folder: Path, seed: int = 0) -> None:
    """Write stage_a, stage_b and stage_c .safetensors and text_encoder/ (Hugging Face layout) into `folder`, F32."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, stage in enumerate(TINY_STAGES):
        config = PRESETS[stage, Variant.TINY]
        tensors = _random_tensors(_original_shapes(config), np.random.default_rng([seed, number]))
        if stage is Stage.VQGAN:
            _center_on_grey(tensors)
        _write(folder / f"{ORIGINAL_NAMES[stage]}.safetensors", tensors)
    text_encoder = PRESETS[Stage.TEXT_ENCODER, Variant.TINY]
    write_folder_files(folder, {Stage.TEXT_ENCODER: text_encoder}, index=False)
    tensors = _random_tensors(expected_tensors(text_encoder), np.random.default_rng([seed, len(TINY_STAGES)]))
    _write(folder / Stage.TEXT_ENCODER / "model.safetensors", tensors)


def _original_shapes(config: NetworkConfig) -> dict[str, Shape]:
    made = to_diffusers(config.stage, Layout.ORIGINAL).inverse.apply(expected_tensors(config))
    return {name: tensor.shape for name, tensor in made.items()}


def _random_tensors(shapes: dict[str, Shape], rng: np.random.Generator) -> Tensors:
    return {name: _random_tensor(name, shape, rng) for name, shape in shapes.items()}


def _random_tensor(name: str, shape: Shape, rng: np.random.Generator) -> NDArray[np.float32]:
    """Weights that keep activations near 1 and leave nothing at zero, where a mistake could hide."""
    if name.endswith("running_var"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    noise = rng.standard_normal(shape, dtype=np.float32) * np.float32(_deviation(name, shape))
    is_norm_weight = "norm" in name and name.endswith("weight")
    return noise + np.float32(1) if is_norm_weight else noise


def _deviation(name: str, shape: Shape) -> float:
    if len(shape) < 2 or name.endswith((".gamma", ".beta")):
        return 0.5 if name.endswith("gammas") else 0.1
    if name.endswith("embedding.weight"):
        return 0.5
    return 1 / math.sqrt(math.prod(shape[1:]))


def _center_on_grey(tensors: Tensors) -> None:
    """Let the vqgan's images vary around 0.5 without reaching 0 or 1 everywhere."""
    tensors["up_blocks.0.0.weight"] /= LATENTS_NEAR
    tensors["out_block.0.weight"] *= np.float32(0.15)
    tensors["out_block.0.bias"] += np.float32(0.5)


def _write(path: Path, tensors: Tensors) -> None:
    """Write the tensors, each counter of a BatchNorm as I64."""
    write_safetensors(path, {name: _plan(name, tensor) for name, tensor in tensors.items()}, {"format": "pt"})


def _plan(name: str, tensor: NDArray[np.float32]) -> TensorPlan:
    if is_counter(name):
        return TensorPlan("I64", tensor.shape, (constant(np.full(tensor.shape, 1000, "<i8")),))
    return TensorPlan("F32", tensor.shape, (constant(tensor.astype("<f4")),))
