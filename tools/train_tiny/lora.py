"""The LoRA: pictures as cyanotypes, a style that stage C has never seen. Only attention changes, as in Stability's."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cascadekit.runtime.engines.pytorch.networks.blocks import Attention
from cascadekit.runtime.engines.pytorch.networks.prior import Prior

from .device import to_device
from .diffusion import noise_loss
from .prior import BATCH, CAP, HIGH_SHARE, NO_TEXT, Inputs, Writer, predicted_noise, sample_latents
from .towers import encode
from .trainer import Plan, train

PLAN = Plan(steps=1500, rate=1e-3, average=0.99, decay=0.0, warmup=30, sheet=200)
RANK = 2


class Adapter(nn.Module):
    """What one attention's projections have on top; as in Stability's files, q, k and v share their first factor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out_down, self.in_down = (nn.Parameter(torch.randn(RANK, width) / width**0.5) for _ in range(2))
        self.out_up, self.in_up = nn.Parameter(torch.zeros(width, RANK)), nn.Parameter(torch.zeros(3 * width, RANK))


class Adapted(nn.Module):
    """A layer with a low-rank addition."""

    def __init__(self, layer: nn.Module, factors: Callable[[], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.layer, self.factors = layer, factors

    def forward(self, x: Tensor) -> Tensor:
        down, up = self.factors()
        y: Tensor = self.layer(x) + (x @ down.T) @ up.T / RANK
        return y


def adapt(prior: Prior) -> nn.ModuleList:
    """Put an adapter onto every attention of `prior`, in the order of the modules. Returns the adapters."""
    adapters = nn.ModuleList()
    for attention in [module for module in prior.modules() if isinstance(module, Attention)]:
        width = attention.to_q.out_features
        adapter = Adapter(width)
        for place, name in enumerate(("to_q", "to_k", "to_v")):
            rows = slice(place * width, (place + 1) * width)
            setattr(attention, name, Adapted(getattr(attention, name), _in_factors(adapter, rows)))
        attention.to_out[0] = Adapted(attention.to_out[0], _out_factors(adapter))
        adapters.append(adapter)
    return adapters


def _in_factors(adapter: Adapter, rows: slice) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (adapter.in_down, adapter.in_up[rows])


def _out_factors(adapter: Adapter) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (adapter.out_down, adapter.out_up)


def train_lora(
    folder: Path, inputs: Inputs, writer: Writer, decode: Callable[[Tensor, Path], None], steps: int | None
) -> None:
    """Train on the pictures after the plain ones. `decode` makes a sheet of stage C's latents."""
    adapters = adapt(writer.prior)
    seen = torch.zeros(BATCH, 1, inputs.image_embeds.shape[1])

    def loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        rows = rng.integers(inputs.plain, len(inputs.semantic), size=BATCH)
        ids = inputs.words.captions[rows, rng.integers(inputs.words.captions.shape[1], size=BATCH)]
        ids = np.where(rng.random((BATCH, 1)) < NO_TEXT, inputs.words.empty, ids)
        with torch.no_grad():
            hidden, pooled = encode(writer.text, ids, inputs.words)
        clean = to_device(inputs.semantic[rows])
        return noise_loss(
            lambda x, t: predicted_noise(writer.prior, x, t, (hidden, pooled, seen)), clean, CAP, HIGH_SHARE
        )

    def show(_: nn.Module, path: Path) -> None:
        decode(sample_latents(writer, inputs.words, inputs.words.captions[:16, 0]), path)

    train(folder, adapters, PLAN.cut(steps), loss, show)


def save_stability(path: Path, adapters: nn.ModuleList) -> None:
    """Write the adapters in the format of Stability's training: a numbered pair for each weight, out_proj first."""
    tensors: dict[str, Tensor] = {}
    for place, adapter in enumerate(adapters):
        assert isinstance(adapter, Adapter)
        pairs = ((adapter.out_down, adapter.out_up), (adapter.in_down, adapter.in_up))
        for number, (down, up) in enumerate(pairs, start=2 * place):
            tensors[f"weights.{number}.lora_down"] = down.detach().half().contiguous()
            tensors[f"weights.{number}.lora_up"] = up.detach().half().contiguous()
    save_file(tensors, path)
