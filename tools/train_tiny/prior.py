"""Stage C: from captions, and now and then a picture's embedding, to the latents of the effnet encoder.

The text encoder goes on learning here, which costs little and helps much. Its pooled output has to stay what it was,
since stage B is trained with that at the same time and the image encoder lies beside it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from cascadekit.runtime.engines.pytorch.networks.prior import Prior
from cascadekit.runtime.engines.pytorch.networks.text_encoder import TextEncoder

from .configs import PRIOR
from .device import seeded, to_device
from .diffusion import STRAIGHT, count_rows, fit_head, initialise, noise_loss, sample
from .towers import compact_config, encode
from .trainer import Plan, train
from .words import FULL_LENGTH, LENGTH, Words

PLAN = Plan(steps=9000, rate=1.2e-3, warmup=200, average=0.998, sheet=500, slow=STRAIGHT)
BATCH, SIDE, CAP = 64, 3, 20.0
HIGH_SHARE = 0.5  # of a batch, at ratios where the caption decides
NO_TEXT, PICTURE = 0.12, 0.12  # shares of a batch without a caption, and with a picture's embedding
GUIDANCE, STEPS = 4.0, 20


def make_prior() -> Prior:
    network = Prior(PRIOR)
    initialise(network)
    rows = SIDE * SIDE + LENGTH + 2 * PRIOR.clip_seq
    bias = torch.zeros(rows)
    bias[SIDE * SIDE + LENGTH - 1] = math.log(FULL_LENGTH - LENGTH + 1)
    count_rows(network, bias)
    hidden, pooled = torch.randn(256, LENGTH, PRIOR.clip_text_in_channels or 0), torch.randn(256, 1, 64)
    fit_head(network, lambda x, t: predicted_noise(network, x, t, (hidden, pooled, pooled)), (256, 16, SIDE, SIDE))
    return network


class Writer(nn.Module):
    """Stage C and the text encoder that is trained with it."""

    def __init__(self, words: Words) -> None:
        super().__init__()
        self.prior, self.text = make_prior(), TextEncoder(compact_config(words))


def predicted_noise(network: Prior, x: Tensor, t: Tensor, conditions: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    hidden, pooled, seen = conditions
    found: Tensor = network(sample=x, timestep_ratio=t, clip_text=hidden, clip_text_pooled=pooled, clip_img=seen)[
        "noise_pred"
    ]
    return found


@dataclass(frozen=True)
class Inputs:
    """What stage C learns from: one row for each picture."""

    words: Words
    text: TextEncoder  # compact, frozen: its pooled output is what stage B and the image encoder know
    rows_text: TextEncoder  # the same, whose rows were trained to tell the latents
    semantic: NDArray[np.float32]  # (n, 16, 3, 3)
    image_embeds: NDArray[np.float32]  # (n, projection)
    plain: int  # the first pictures, which stage C learns


def train_prior(folder: Path, inputs: Inputs, decode: Callable[[Tensor, Path], None], steps: int | None) -> None:
    """`decode` makes a sheet of stage C's latents."""
    network = Writer(inputs.words)
    network.text.load_state_dict(inputs.rows_text.state_dict())
    network.text.requires_grad_(True)

    def loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        rows = rng.integers(inputs.plain, size=BATCH)
        ids = inputs.words.captions[rows, rng.integers(inputs.words.captions.shape[1], size=BATCH)]
        pictured = rng.random(BATCH) < PICTURE
        silent = rng.random(BATCH) < np.where(pictured, 0.5, NO_TEXT)
        ids = np.where(silent[:, None], inputs.words.empty, ids)
        with torch.no_grad():
            wanted = encode(inputs.text, ids, inputs.words)[1]
        hidden, pooled = encode(network.text, ids, inputs.words)
        kept = F.mse_loss(pooled, wanted) / wanted.square().mean()
        seen = to_device(inputs.image_embeds[rows] * pictured[:, None].astype(np.float32))[:, None]
        clean = to_device(inputs.semantic[rows])

        found = noise_loss(
            lambda x, t: predicted_noise(network.prior, x, t, (hidden, pooled, seen)), clean, CAP, HIGH_SHARE
        )
        return {**found, "loss": found["loss"] + 0.3 * kept, "kept": kept}

    def show(_: nn.Module, path: Path) -> None:
        decode(sample_latents(network, inputs.words, inputs.words.captions[:16, 0]), path)

    train(folder, network, PLAN.cut(steps), loss, show)


@torch.no_grad()
def sample_latents(
    network: Writer, words: Words, ids: NDArray[np.int16], *, guidance: float = GUIDANCE, seed: int = 0
) -> Tensor:
    """Sample latents (B, 16, 3, 3) for compact ids (B, LENGTH), as the product does by default."""
    both = np.concatenate([ids, np.broadcast_to(words.empty, ids.shape)])
    hidden, pooled = encode(network.text, both, words)
    seen = torch.zeros(len(both), 1, PRIOR.clip_image_in_channels or 0)
    generator = seeded(seed)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        found = predicted_noise(network.prior, torch.cat([x, x]), torch.cat([t, t]), (hidden, pooled, seen))
        told, untold = found.chunk(2)
        return untold + guidance * (told - untold)

    noise = torch.randn(len(ids), PRIOR.in_channels, SIDE, SIDE, generator=generator)
    return sample(predict, noise, STEPS, generator)
