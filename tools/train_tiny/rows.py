"""The text encoder's rows learn to tell stage C's latents, before stage C learns to read them.

A head of attention predicts the clean latents from the rows. There is no noise in this, and a step costs a third of
one of stage C. So the encoder learns in minutes which words mean which picture."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cascadekit.runtime.engines.pytorch.networks.text_encoder import TextEncoder

from .configs import PRIOR, TEXT
from .device import to_device
from .prior import Inputs
from .towers import compact_config, encode
from .trainer import Plan, train
from .words import Words

PLAN = Plan(steps=2500, rate=2e-3, warmup=50, average=0.99, decay=0.02, sheet=2500)
BATCH, SIDE = 64, 3


class RowsReader(nn.Module):
    """The text encoder, and a head that reads its rows: a query for each of the latents' pixels."""

    def __init__(self, words: Words, inner: int = 96) -> None:
        super().__init__()
        self.text = TextEncoder(compact_config(words))
        self.queries = nn.Parameter(torch.randn(SIDE * SIDE, inner) * 0.3)
        self.rows = nn.Linear(TEXT.hidden_size, inner)
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(inner, 4, 4 * inner, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.latents = nn.Linear(inner, PRIOR.in_channels)

    def forward(self, hidden: Tensor) -> Tensor:
        """Rows (B, n, c) to latents (B, 16, 3, 3)."""
        rows, made = self.rows(hidden), self.queries.expand(len(hidden), -1, -1)
        for layer in self.layers:
            made = layer(made, rows)
        found: Tensor = self.latents(made).transpose(1, 2).unflatten(2, (SIDE, SIDE))
        return found


def train_rows(folder: Path, inputs: Inputs, steps: int | None) -> None:
    """Train from the text encoder in `inputs`, whose pooled output stays nearly what it is."""
    network = RowsReader(inputs.words)
    network.text.load_state_dict(inputs.text.state_dict())

    def loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        rows = rng.integers(inputs.plain, size=BATCH)
        ids = inputs.words.captions[rows, rng.integers(inputs.words.captions.shape[1], size=BATCH)]
        with torch.no_grad():
            wanted = encode(inputs.text, ids, inputs.words)[1]
        hidden, pooled = encode(network.text, ids, inputs.words)
        error = F.mse_loss(network(hidden), to_device(inputs.semantic[rows]))
        kept = F.mse_loss(pooled, wanted) / wanted.square().mean()
        return {"loss": error + 0.3 * kept, "error": error, "kept": kept}

    train(folder, network, PLAN.cut(steps), loss, lambda network, path: None)
