"""Writes the trained networks as Stability's files, in 16 bits, by way of a model folder and the converter."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cascadekit import convert, convert_lora
from cascadekit.converters.checkpoints.model_folder import write_folder_files
from cascadekit.schemas.stages import ORIGINAL_VQGAN_SCALE, NetworkConfig, Stage

from .autoencoder import VQGANPair
from .configs import CANNY, DECODER, EFFNET, IMAGE, PREVIEWER, PRIOR, TEXT, VQGAN
from .device import seeded, to_device
from .lora import save_stability
from .words import LENGTH, Words

CONFIGS: Mapping[Stage, NetworkConfig] = {
    Stage.TEXT_ENCODER: TEXT,
    Stage.IMAGE_ENCODER: IMAGE,
    Stage.PRIOR: PRIOR,
    Stage.DECODER: DECODER,
    Stage.VQGAN: replace(VQGAN, scale_factor=ORIGINAL_VQGAN_SCALE),
    Stage.EFFNET_ENCODER: EFFNET,
    Stage.PREVIEWER: PREVIEWER,
    Stage.CONTROLNET_CANNY: CANNY,
}
WEIGHTS = {Stage.TEXT_ENCODER: "model.safetensors", Stage.IMAGE_ENCODER: "model.safetensors"}


def write_original(output: Path, networks: Mapping[Stage, Mapping[str, Tensor]]) -> None:
    """Write ``stage_a`` to ``stage_c``, the other single files and the folders of both CLIP encoders into `output`."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        for stage, tensors in networks.items():
            path = model / stage / WEIGHTS.get(stage, "diffusion_pytorch_model.safetensors")
            path.parent.mkdir(parents=True)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
        write_folder_files(model, {stage: CONFIGS[stage] for stage in networks}, index=True)
        # The passport would name the temporary folder's files.
        convert([model], output, "original", dtype="fp16", force=True, passport=False)


def write_loras(runs: Path, adapters: nn.ModuleList) -> None:
    """Write the LoRA in Stability's format and in kohya's, into ``lora-files``."""
    folder = runs / "lora-files"
    folder.mkdir(exist_ok=True)
    save_stability(folder / "cyanotype.safetensors", adapters)
    convert_lora(
        folder / "cyanotype.safetensors",
        folder / "cyanotype_kohya.safetensors",
        "kohya",
        against=runs / "original" / "stage_c.safetensors",
        force=True,
    )


def vqgan_tensors(network: VQGANPair, latents: np.ndarray) -> dict[str, Tensor]:
    """Both halves of the VQGAN, and a codebook fitted to some of stage B's `latents` (n, 4, h, w)."""
    halves = {**network.encoder.state_dict(), **network.decoder.state_dict()}
    some = latents[:: max(1, len(latents) // 200)].astype(np.float32).transpose(0, 2, 3, 1).reshape(-1, 4)
    return {**halves, "vquantizer.embedding.weight": codebook(to_device(some) * ORIGINAL_VQGAN_SCALE)}


def codebook(points: Tensor, rounds: int = 8) -> Tensor:
    """The k means of `points` (n, c)."""
    generator = seeded(0)
    count = VQGAN.num_vq_embeddings
    points = points[torch.randperm(len(points), generator=generator)[: 40 * count]]
    centres = points[:count].clone()
    for _ in range(rounds):
        nearest = torch.cdist(points, centres).argmin(dim=1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        number = torch.bincount(nearest, minlength=count)[:, None]
        centres = torch.where(number > 0, sums / number.clamp(min=1), centres)
    return centres


def text_tensors(network: nn.Module, words: Words) -> dict[str, Tensor]:
    """The text encoder with the tokenizer's whole vocabulary: zero for tokens that no caption has."""
    tensors = dict(network.state_dict())
    table = "text_model.embeddings.token_embedding.weight"
    whole = torch.zeros(TEXT.vocab_size, TEXT.hidden_size)
    whole[to_device(words.vocabulary)] = tensors[table]
    places = "text_model.embeddings.position_embedding.weight"
    last = tensors[places][-1:].expand(TEXT.max_position_embeddings - LENGTH, -1)
    return {**tensors, table: whole, places: torch.cat([tensors[places], last])}
