"""The CLIP text model with projection; attribute names are the key names of transformers."""

import torch
from torch import Tensor, nn

from ...schemas.errors import LayoutError
from ...schemas.stages import TextEncoderConfig
from .blocks import attend

# Configs written before transformers 4.31 say 2, whatever the vocabulary; the end is the highest id then.
LEGACY_EOS = 2


class QuickGELU(nn.Module):
    """The sigmoid approximation of GELU that OpenAI's CLIP models use."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "quick_gelu": QuickGELU}


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence (B, n, c) on itself, where the mask (B, 1, n, n) is True."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, mask))
        return y


class MLP(nn.Module):
    """The perceptron per token: (B, n, c) to the same."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATIONS[config.hidden_act]()
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.activation(self.fc1(x)))
        return y


class Layer(nn.Module):
    """A transformer layer, norms first: (B, n, c) to the same."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SelfAttention(config.hidden_size, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        y: Tensor = x + self.mlp(self.layer_norm2(x))
        return y


class Embeddings(nn.Module):
    """Token plus position: ids (B, n) to (B, n, c)."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        y: Tensor = self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]
        return y


class Encoder(nn.Module):
    """The stack of layers: (B, n, c) to the same."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


class TextModel(nn.Module):
    """Ids and mask, both (B, n), to the last layer's output (B, n, c) and the same normed."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.encoder(self.embeddings(input_ids), attention_allowed(attention_mask))
        return x, self.final_layer_norm(x)


class TextEncoder(nn.Module):
    """The text encoder; keys as in transformers. Raises LayoutError for an activation other than those above."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        if config.hidden_act not in ACTIVATIONS:
            known = " or ".join(ACTIVATIONS)
            raise LayoutError(f"config of the {config.stage}: hidden_act must be {known}, found {config.hidden_act}")
        self.config = config
        self.text_model = TextModel(config)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, *, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Embeddings of tokenized prompts, ``input_ids`` and ``attention_mask`` both (B, n) int64.

        ``prompt_embeds`` (B, n, hidden) is the last layer's output before the final norm, ``pooled``
        (B, 1, projection) the projection of its normed row at the end token; both in the dtype of the weights.
        """
        hidden, normed = self.text_model(input_ids, attention_mask)
        rows = torch.arange(input_ids.shape[0], device=input_ids.device)
        pooled = normed[rows, end_positions(input_ids, self.config.eos_token_id)]  # (B, hidden)
        return {"prompt_embeds": hidden, "pooled": self.text_projection(pooled)[:, None]}


def attention_allowed(attention_mask: Tensor) -> Tensor:
    """(B, n), 0 for padding, to (B, 1, n, n): tokens see themselves and those before, but no padding."""
    length = attention_mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).tril()
    return causal & attention_mask.bool()[:, None, None, :]


def end_positions(input_ids: Tensor, eos_token_id: int) -> Tensor:
    """Where each prompt ends, (B, n) to (B,): at the first end token, as padding may repeat it; at 0 without one."""
    marks = input_ids if eos_token_id == LEGACY_EOS else (input_ids == eos_token_id).int()
    return marks.argmax(dim=-1)
