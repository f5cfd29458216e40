"""The transformer of the CLIP models, text and vision; attribute names are the key names of transformers."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from .....schemas.errors import LayoutError
from .....schemas.stages import ImageEncoderConfig, TextEncoderConfig
from .blocks import attend

ClipConfig = TextEncoderConfig | ImageEncoderConfig


class QuickGELU(nn.Module):
    """The sigmoid approximation of GELU that OpenAI's CLIP models use."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "quick_gelu": QuickGELU}


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence (B, n, c) on itself, where the mask (B, 1, n, n) is True or missing."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y: Tensor = self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, mask))
        return y


def _perceptron(config: ClipConfig) -> nn.Sequential:
    """The perceptron per token: (B, n, c) to (B, n, c)."""
    wide = nn.Linear(config.hidden_size, config.intermediate_size)
    narrow = nn.Linear(config.intermediate_size, config.hidden_size)
    return nn.Sequential(OrderedDict(fc1=wide, activation=ACTIVATIONS[config.hidden_act](), fc2=narrow))


class EncoderLayer(nn.Module):
    """A transformer layer, norms first: (B, n, c) to (B, n, c)."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SelfAttention(config.hidden_size, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = _perceptron(config)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        y: Tensor = x + self.mlp(self.layer_norm2(x))
        return y


class Encoder(nn.Module):
    """The stack of layers: (B, n, c) to (B, n, c)."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


def check_activation(config: ClipConfig) -> None:
    """Raise LayoutError for an activation that is not in ACTIVATIONS."""
    if config.hidden_act not in ACTIVATIONS:
        known = " or ".join(ACTIVATIONS)
        raise LayoutError(f"config of the {config.stage}: hidden_act must be {known}, found {config.hidden_act}")
