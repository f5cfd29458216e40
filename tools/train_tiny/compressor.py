"""The effnet encoder and the previewer.

The encoder learns together with a head that predicts stage B's latents from its own: what the head needs for that is
what stage B will need. The previewer learns afterwards, from the finished latents."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from cascadekit.runtime.engines.pytorch.networks.effnet_encoder import EffnetEncoder
from cascadekit.runtime.engines.pytorch.networks.previewer import Previewer
from cascadekit.runtime.images.pictures import IMAGENET_MEAN, IMAGENET_STD

from .autoencoder import VQGANPair, to_tensor, unit_penalty
from .configs import EFFNET, PREVIEWER
from .dataset import Dataset
from .device import to_array, to_device
from .pictures import sheet
from .trainer import Plan, train

PLAN = Plan(steps=4600, rate=2.5e-3, warmup=100, average=0.995, sheet=400)
PREVIEWER_PLAN = Plan(steps=6000, rate=4e-3, warmup=100, average=0.995, sheet=1500)
BATCH = 32
LEAST_CONTENT = 0.1  # variance within a picture's latents that counts as some content
NOISE = 0.1  # added to the latents, whose deviation is 1: neighbours must mean nearly the same


class Refinement(nn.Module):
    """A residual block that begins as the identity; (B, c, h, w) keeps its shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 1),
        )
        nn.init.zeros_(self.layers[3].weight)
        nn.init.zeros_(self.layers[3].bias)

    def forward(self, x: Tensor) -> Tensor:
        refined: Tensor = x + self.layers(x)
        return refined


class Compressor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = EffnetEncoder(EFFNET)
        layers: list[nn.Module] = [nn.Conv2d(EFFNET.c_latent, 128, 1), nn.GELU()]
        for wide, narrow in ((128, 96), (96, 64)):  # 3 -> 6 -> 12
            layers += [nn.ConvTranspose2d(wide, narrow, 2, 2), nn.GELU(), nn.Conv2d(narrow, narrow, 3, padding=1)]
            layers += [nn.BatchNorm2d(narrow), nn.GELU(), Refinement(narrow), Refinement(narrow)]
        self.wide = nn.Sequential(*layers)
        self.fine = nn.Sequential(
            nn.Conv2d(64, 64, 3, padding=1),
            nn.GELU(),
            Refinement(64),
            Refinement(64),
            nn.Conv2d(64, 16, 1),
            nn.PixelShuffle(2),
        )

    def train(self, mode: bool = True) -> "Compressor":
        """The BatchNorm of the latents keeps its statistics: those of a few pictures would disturb the head."""
        super().train(mode)
        self.encoder.mapper[1].eval()
        return self

    def latents(self, images: Tensor) -> Tensor:
        """Images (B, 3, 128, 128) in 0..1 to stage C's latents (B, 16, 3, 3)."""
        found: Tensor = self.encoder(pixels=effnet_pixels(images))["effnet"]
        return found

    def predict(self, latents: Tensor) -> Tensor:
        """Stage C's latents to a guess at stage B's (B, 4, 32, 32)."""
        wide = F.interpolate(self.wide(latents), size=(16, 16), mode="bilinear", align_corners=True)
        made: Tensor = self.fine(wide)
        return made


def effnet_pixels(images: Tensor) -> Tensor:
    """Pictures of 128 pixels, resized to 96 and normalised."""
    mean, std = (images.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    small = F.interpolate(images, scale_factor=0.75, mode="bilinear", antialias=True)
    return (small - mean) / std


def train_compressor(
    folder: Path, data: Dataset, latents: NDArray[np.float16], vqgan: VQGANPair, steps: int | None
) -> None:
    network = Compressor().to(memory_format=torch.channels_last)

    def loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        rows = np.sort(rng.choice(len(latents), BATCH, replace=False))
        target = to_device(latents[rows].astype(np.float32))
        found = network.latents(to_tensor(data.pictures[rows]))
        made = network.predict(found + NOISE * torch.randn_like(found))
        errors, contents = (made - target).square().mean(dim=(1, 2, 3)), target.var(dim=(2, 3)).mean(dim=1)  # (B,)
        # A small shape must count as much as an icon that fills the picture.
        relative, spread = (errors / (contents + LEAST_CONTENT)).mean(), unit_penalty(found)
        return {"loss": relative + 0.02 * spread, "error": errors.mean(), "relative": relative, "spread": spread}

    held = to_tensor(data.pictures[:8])

    def show(_: nn.Module, path: Path) -> None:
        sheet(path, [list(to_array(held)), list(to_array(vqgan.images(network.predict(network.latents(held)))))])

    train(folder, network, PLAN.cut(steps), loss, show)


@torch.no_grad()
def all_semantic(network: Compressor, data: Dataset, folder: Path, batch: int = 64) -> None:
    """Stage C's latents of every picture, into ``semantic.npy`` (n, 16, 3, 3), with the mean 0 and the deviation 1.

    ``whitening.npy`` are the statistics with which the encoder's BatchNorm makes them so, ``unwhitening.npy`` the mean
    and the deviation that the head knows them with; each (2, 16)."""
    made = [network.latents(to_tensor(data.pictures[at : at + batch])) for at in range(0, len(data.pictures), batch)]
    raw = torch.cat(made)
    mean, deviation = raw.mean(dim=(0, 2, 3)), raw.std(dim=(0, 2, 3))
    norm = network.encoder.mapper[1]
    scale = (norm.running_var + norm.eps).sqrt()
    whitening = torch.stack([norm.running_mean + mean * scale, (scale * deviation).square() - norm.eps])
    np.save(folder / "whitening.npy", to_array(whitening))
    np.save(folder / "unwhitening.npy", to_array(torch.stack([mean, deviation])))
    np.save(folder / "semantic.npy", to_array((raw - mean[:, None, None]) / deviation[:, None, None]))


def train_previewer(folder: Path, data: Dataset, semantic: NDArray[np.float32], steps: int | None) -> None:
    network = Previewer(PREVIEWER).to(memory_format=torch.channels_last)

    def loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        rows = np.sort(rng.choice(len(semantic), BATCH, replace=False))
        target = F.adaptive_avg_pool2d(to_tensor(data.pictures[rows]), 24)
        latents = to_device(semantic[rows])
        made = network.blocks(latents + NOISE * torch.randn_like(latents))
        return {"loss": F.mse_loss(made, target)}

    held, latents = to_tensor(data.pictures[:8]), to_device(semantic[:8])

    def show(_: nn.Module, path: Path) -> None:
        made = F.interpolate(network(latents=latents)["images"], size=(128, 128))
        sheet(path, [list(to_array(held)), list(to_array(made))])

    train(folder, network, PREVIEWER_PLAN.cut(steps), loss, show)
