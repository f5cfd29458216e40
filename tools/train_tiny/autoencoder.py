"""Stage A: the VQGAN, trained on crops as a plain autoencoder whose latents are disturbed a little.

Generation never quantises, so no codebook is learned along the way: the one in the file is fitted afterwards."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from cascadekit.runtime.engines.pytorch.networks.vqgan import MixingBlock, VQGANDecoder, VQGANEncoder
from cascadekit.schemas.stages import ORIGINAL_VQGAN_SCALE

from .configs import VQGAN
from .dataset import Dataset
from .device import to_array, to_device
from .pictures import sheet
from .trainer import Plan, train

PLAN = Plan(steps=1200, rate=4e-3, warmup=60, average=0.995, sheet=200)
CROP, BATCH, NOISE = 64, 16, 0.06


class VQGANPair(nn.Module):
    """Both halves. The latents outside the network have the deviation ORIGINAL_VQGAN_SCALE, stage B's have 1."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = VQGANEncoder(VQGAN), VQGANDecoder(VQGAN)
        norm = self.encoder.down_blocks[-1][1]
        norm.weight.data.fill_(ORIGINAL_VQGAN_SCALE)
        norm.weight.requires_grad_(False)
        norm.bias.requires_grad_(False)
        for block in self.modules():
            if isinstance(block, MixingBlock):
                block.gammas.data[[2, 5]] = 0.3
        # The decoder begins at grey, where all of its outputs have a gradient.
        self.decoder.out_block[0].bias.data.fill_(0.5)

    def train(self, mode: bool = True) -> "VQGANPair":
        """The BatchNorm of the latents keeps its statistics: those of a few crops would disturb the decoder."""
        super().train(mode)
        self.encoder.down_blocks[-1][1].eval()
        return self

    def latents(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in 0..1 to stage B's latents (B, 4, H/4, W/4)."""
        found: Tensor = self.encoder(images=images)["latents"] / ORIGINAL_VQGAN_SCALE
        return found

    def images(self, latents: Tensor, *, clamp: bool = True) -> Tensor:
        """Stage B's latents to images."""
        made: Tensor = self.decoder.out_block(self.decoder.up_blocks(ORIGINAL_VQGAN_SCALE * latents))
        return made.clamp(0, 1) if clamp else made


def to_tensor(pictures: NDArray[np.uint8]) -> Tensor:
    """(B, h, w, 3) levels to (B, 3, h, w) in 0..1."""
    return to_device(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255


def unit_penalty(latents: Tensor) -> Tensor:
    """How far the channels' means and deviations are from 0 and 1."""
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    return (mean.square() + (deviation - 1).square()).mean()


def train_vqgan(folder: Path, data: Dataset, steps: int | None = None) -> None:
    network = VQGANPair().to(memory_format=torch.channels_last)

    def crops(rng: np.random.Generator) -> Tensor:
        most = data.pictures.shape[1] - CROP
        picked = []
        for index in rng.integers(len(data.pictures), size=BATCH):
            x, y = rng.integers(most + 1, size=2)
            picked.append(data.pictures[index, y : y + CROP, x : x + CROP])
        return to_tensor(np.stack(picked))

    def loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        images = crops(rng)
        latents = network.latents(images)
        made = network.images(latents + NOISE * torch.randn_like(latents), clamp=False)
        flat, square = F.l1_loss(made, images), F.mse_loss(made, images)
        edges = sum(F.l1_loss(a.diff(dim=d), b.diff(dim=d)) for d in (2, 3) for a, b in ((made, images),))
        spread = unit_penalty(latents)
        return {"loss": flat + 4 * square + edges + 0.1 * spread, "l1": flat, "mse": square, "spread": spread}

    held = to_tensor(data.pictures[:6])

    def show(_: nn.Module, path: Path) -> None:
        sheet(path, [list(to_array(held)), list(to_array(network.images(network.latents(held))))])

    plan = PLAN.cut(steps)
    train(folder, network, plan, loss, show)


@torch.no_grad()
def calibrate(network: VQGANPair, data: Dataset, pictures: int = 1024) -> None:
    """Give the latents of all pictures the mean 0 and the deviation 1 exactly; the images stay what they are."""
    norm, entrance = network.encoder.down_blocks[-1][1], network.decoder.up_blocks[0][0]
    found = torch.cat(
        [
            network.latents(to_tensor(data.pictures[at : at + 64]))
            for at in range(0, min(pictures, len(data.pictures)), 64)
        ]
    )
    mean, deviation = found.mean(dim=(0, 2, 3)), found.std(dim=(0, 2, 3))  # (4,)
    scale = norm.running_var.add(norm.eps).sqrt()  # old latents = (x - running mean) / scale
    norm.running_mean.add_(mean * scale)
    norm.running_var.copy_((scale * deviation).square() - norm.eps)
    entrance.bias.add_(entrance.weight[:, :, 0, 0] @ (mean * ORIGINAL_VQGAN_SCALE))
    entrance.weight.mul_(deviation[None, :, None, None])


@torch.no_grad()
def all_latents(network: VQGANPair, data: Dataset, folder: Path, batch: int = 64) -> None:
    """Stage B's latents of every picture, into ``latents.npy`` (n, 4, 32, 32) in half precision. Resumes."""
    side, part, total = data.pictures.shape[1] // 4, folder / "latents.part.npy", len(data.pictures)
    if not part.exists():
        np.lib.format.open_memmap(part, "w+", np.float16, (total, 4, side, side)).flush()
    made = np.load(part, mmap_mode="r+")
    for start in range(0, total, batch):
        if not made[start].any():
            made[start : start + batch] = to_array(
                network.latents(to_tensor(data.pictures[start : start + batch])).half()
            )
    made.flush()
    part.rename(folder / "latents.npy")
