"""Stage B: from stage C's latents to those of the VQGAN."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from cascadekit.bench.judge.scenes import Scene, Shapes
from cascadekit.runtime.engines.pytorch.networks.decoder import Decoder

from .configs import DECODER
from .device import seeded, to_device
from .diffusion import STRAIGHT, fit_head, initialise, noise_loss, sample
from .prior import NO_TEXT, Inputs
from .towers import encode
from .trainer import Plan, train

PLAN = Plan(steps=22000, rate=1.2e-3, warmup=200, average=0.998, sheet=500, slow=STRAIGHT)
BATCH, CAP = 16, 40.0
HIGH_SHARE = 0.3  # of a batch: ratios at which stage C's latents decide what there will be
NOISE = 0.3  # most of what is added to stage C's latents, since the prior's own are never quite right
STEPS = 10
HARD = 2.0  # how often a picture is taken whose outlines are the last to become sharp
CONTENT = 0.3  # by how much latents of deviation 1 differ from the background's
CONTENT_SHARE = 0.4  # of the pixels: content that fills less weighs more


def make_decoder() -> Decoder:
    network = Decoder(DECODER)
    initialise(network)
    pooled, semantic = torch.randn(16, 1, 64), torch.randn(16, 16, 3, 3)
    fit_head(network, lambda x, t: _predicted(network, x, t, pooled, semantic), (16, 4, 32, 32))
    return network


def train_decoder(
    folder: Path,
    inputs: Inputs,
    latents: NDArray[np.float16],
    scenes: Sequence[Scene],
    show_latents: Callable[[Tensor, NDArray[np.int64], Path], None],
    steps: int | None,
) -> None:
    """`latents` (n, 4, 32, 32) are the VQGAN's, of pictures of `scenes`.

    `show_latents` makes a sheet of latents beside some rows' pictures."""
    network = make_decoder().to(memory_format=torch.channels_last)
    shares = shares_of(scenes)

    def loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        rows = np.sort(rng.choice(len(latents), BATCH, replace=False, p=shares))
        pooled = _pooled(inputs, rows, rng)
        semantic = to_device(inputs.semantic[rows])
        semantic = semantic + NOISE * torch.rand(BATCH, 1, 1, 1) * torch.randn_like(semantic)
        clean = to_device(latents[rows].astype(np.float32))
        return noise_loss(
            lambda x, t: _predicted(network, x, t, pooled, semantic), clean, CAP, HIGH_SHARE, content_weights(clean)
        )

    def show(_: nn.Module, path: Path) -> None:
        rows = np.arange(12)
        pooled = _pooled(inputs, rows, np.random.default_rng(0))
        made = decode(network, to_device(inputs.semantic[rows]), pooled)
        show_latents(made, rows, path)

    train(folder, network, PLAN.cut(steps), loss, show)


def shares_of(scenes: Sequence[Scene]) -> NDArray[np.float64]:
    """How often each scene is taken: twice as often as others if it shows a star or a small shape."""
    hard = [
        isinstance(scene, Shapes) and any(one.shape == "star" or one.size == "small" for one in scene.shapes)
        for scene in scenes
    ]
    weights = np.where(hard, HARD, 1.0)
    found: NDArray[np.float64] = weights / weights.sum()
    return found


def content_weights(clean: Tensor) -> Tensor:
    """(B, 4, h, w) latents to weights (B, 1, h, w): from 1 on the background to 5 on a small shape.

    Otherwise a small shape would count a tenth of what an icon counts that fills the picture."""
    background = clean[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].median(dim=2).values[:, :, None, None]
    content = ((clean - background).abs().amax(dim=1, keepdim=True) > CONTENT).float()
    content = F.max_pool2d(content, 3, stride=1, padding=1)
    share = content.mean(dim=(1, 2, 3), keepdim=True).clamp(min=0.01)
    return 1 + content * (CONTENT_SHARE / share).clamp(1.0, 4.0)


@torch.no_grad()
def decode(network: Decoder, semantic: Tensor, pooled: Tensor, seed: int = 0) -> Tensor:
    """Sample the VQGAN's latents as the product does by default, without guidance."""
    generator = seeded(seed)
    noise = torch.randn(len(semantic), 4, 32, 32, generator=generator)
    return sample(lambda x, t: _predicted(network, x, t, pooled, semantic), noise, STEPS, generator)


def _predicted(network: Decoder, x: Tensor, t: Tensor, pooled: Tensor, semantic: Tensor) -> Tensor:
    found: Tensor = network(sample=x, timestep_ratio=t, clip_text_pooled=pooled, effnet=semantic)["noise_pred"]
    return found


@torch.no_grad()
def _pooled(inputs: Inputs, rows: NDArray[np.int64], rng: np.random.Generator) -> Tensor:
    ids = inputs.words.captions[rows, rng.integers(inputs.words.captions.shape[1], size=len(rows))]
    silent = rng.random(len(rows)) < NO_TEXT
    ids = np.where(silent[:, None], inputs.words.empty, ids)
    return encode(inputs.text, ids, inputs.words)[1]
