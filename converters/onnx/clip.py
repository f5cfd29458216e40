"""The transformer of the CLIP models, text and vision.

Semantics: transformers ``CLIPEncoderLayer`` (models/clip/modeling_clip.py) with eager attention.
"""

from ...schemas.errors import ExportError
from ...schemas.stages import ImageEncoderConfig, TextEncoderConfig
from .graph import Graph
from .layers import self_attention

ClipConfig = TextEncoderConfig | ImageEncoderConfig

QUICK_GELU = 1.702  # x * sigmoid(1.702 x), https://github.com/hendrycks/GELUs
ACTIVATIONS = ("gelu", "quick_gelu")


def check_supported(config: ClipConfig) -> None:
    """Raises ExportError for an activation that CLIP does not use, and when the heads do not divide the width."""
    if config.hidden_act not in ACTIVATIONS:
        raise ExportError(
            f"{config.stage}: hidden_act {config.hidden_act!r} is not supported; expected {' or '.join(ACTIVATIONS)}"
        )
    if config.hidden_size % config.num_attention_heads:
        raise ExportError(f"{config.stage}: num_attention_heads does not divide hidden_size")


def transformer_layer(graph: Graph, config: ClipConfig, name: str, rows: str, mask: str | None) -> str:
    """One pre-norm layer, (B*L, c) -> (B*L, c); `mask` (B or 1, 1, L, L) is added to the scores."""
    normed = norm(graph, config, f"{name}.layer_norm1", rows)
    mixed = self_attention(
        graph,
        f"{name}.self_attn",
        normed,
        heads=config.num_attention_heads,
        mask=mask,
    )
    rows = graph.node("Add", f"{name}/attended", rows, mixed)
    hidden = _activated(graph, config, f"{name}.mlp", norm(graph, config, f"{name}.layer_norm2", rows))
    hidden = graph.linear(f"{name}.mlp.fc2", hidden)
    return graph.node("Add", name, rows, hidden)


def _activated(graph: Graph, config: ClipConfig, mlp: str, rows: str) -> str:
    name = f"{mlp}.activation_fn"
    if config.hidden_act == "gelu":
        return graph.activated(f"{mlp}.fc1", name, rows)
    value = graph.linear(f"{mlp}.fc1", rows)
    scaled = graph.node("Mul", f"{name}/scaled", value, graph.scalar(QUICK_GELU))
    return graph.node("Mul", name, value, graph.node("Sigmoid", f"{name}/sigmoid", scaled))


def norm(graph: Graph, config: ClipConfig, name: str, value: str) -> str:
    """The LayerNorm `name` over the channels."""
    scale, shift = graph.weight(f"{name}.weight"), graph.weight(f"{name}.bias")
    return graph.layer_norm(name, value, config.hidden_size, eps=config.layer_norm_eps, scale=scale, shift=shift)
