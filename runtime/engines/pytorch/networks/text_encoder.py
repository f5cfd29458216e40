"""The CLIP text model with projection; attribute names are the key names of transformers."""

import torch
from torch import Tensor, nn

from .....schemas.stages import TextEncoderConfig
from .clip import Encoder, check_activation

# Configs written before transformers 4.31 have 2, whatever the vocabulary. The end token is then the highest id.
LEGACY_EOS = 2


class TextEmbeddings(nn.Module):
    """Embeddings of tokens plus those of positions: ids (B, n) to (B, n, c)."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        y: Tensor = self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]
        return y


class TextModel(nn.Module):
    """Ids and mask, both (B, n), to the last layer's output (B, n, c) and the same normed."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.encoder(self.embeddings(input_ids), attention_allowed(attention_mask))
        return x, self.final_layer_norm(x)


class TextEncoder(nn.Module):
    """The text encoder; keys as in transformers. Raises LayoutError for an activation that CLIP does not use."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        check_activation(config)
        self.config = config
        self.text_model = TextModel(config)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, *, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Embeddings of tokenized prompts; ``input_ids`` and ``attention_mask`` are both (B, n) int64.

        ``prompt_embeds`` (B, n, hidden) is the last layer's output before the final norm. ``pooled``
        (B, 1, projection) is the projection of its normed row at the end token. Both have the dtype of the weights.
        """
        hidden, normed = self.text_model(input_ids, attention_mask)
        rows = torch.arange(input_ids.shape[0], device=input_ids.device)
        pooled = normed[rows, end_positions(input_ids, self.config.eos_token_id)]  # (B, hidden)
        return {"prompt_embeds": hidden, "pooled": self.text_projection(pooled)[:, None]}


def attention_allowed(attention_mask: Tensor) -> Tensor:
    """The mask of attention (B, 1, n, n): tokens see themselves and earlier tokens, but no padding.

    `attention_mask` (B, n) is 0 for padding."""
    length = attention_mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).tril()
    return causal & attention_mask.bool()[:, None, None, :]


def end_positions(input_ids: Tensor, eos_token_id: int) -> Tensor:
    """The position of each prompt's first end token, (B, n) to (B,); 0 without one. Padding may repeat the token."""
    marks = input_ids if eos_token_id == LEGACY_EOS else (input_ids == eos_token_id).int()
    return marks.argmax(dim=-1)
