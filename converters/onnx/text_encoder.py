"""The CLIP text encoder as a graph.

Semantics: transformers ``CLIPTextModelWithProjection`` (models/clip/modeling_clip.py) with eager attention.
"""

import numpy as np
import onnx
from onnx import TensorProto

from ...schemas.errors import ExportError
from ...schemas.stages import TextEncoderConfig
from .builder import STORAGE_TYPES, TYPE_NAMES, Graph
from .layers import attention

LEGACY_EOS = 2  # configs written before transformers 4.31 say 2 and mean the highest id
QUICK_GELU = 1.702  # x * sigmoid(1.702 x), https://github.com/hendrycks/GELUs
ACTIVATIONS = ("gelu", "quick_gelu")


def write_text_encoder(graph: Graph, config: TextEncoderConfig) -> onnx.ModelProto:
    """input_ids and attention_mask (B, 77) -> prompt_embeds, the last layer's output before the final norm, and
    pooled, the projected row of the end token.

    Raises ExportError for an activation CLIP does not use, indivisible heads, and missing weights."""
    if config.hidden_act not in ACTIVATIONS:
        raise ExportError(f"text_encoder: hidden_act {config.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}")
    if config.hidden_size % config.num_attention_heads:
        raise ExportError("text_encoder: num_attention_heads does not divide hidden_size")
    width, length = config.hidden_size, config.max_position_embeddings
    rows = graph.rows(_embeddings(graph), width)
    mask = _mask(graph, length)
    for layer in range(config.num_hidden_layers):
        rows = _layer(graph, config, f"text_model.encoder.layers.{layer}", rows, mask)
    graph.node("Reshape", "prompt_embeds", rows, graph.integers(-1, length, width))
    _pool(graph, config)
    return graph.model("text_encoder", "CLIP text encoder with projection: token ids to prompt_embeds and pooled")


def _embeddings(graph: Graph) -> str:
    """Token plus position, (B, L, c). Of a table stored in half precision only the rows picked are cast."""
    name = "text_model.embeddings"
    table, dtype = graph.stored(f"{name}.token_embedding.weight")
    tokens = graph.node("Gather", f"{name}.token_embedding", table, "input_ids", axis=0)
    if STORAGE_TYPES.get(dtype) != graph.type:
        tokens = graph.node("Cast", f"{name}.token_embedding/{TYPE_NAMES[graph.type]}", tokens, to=graph.type)
    return graph.node("Add", name, tokens, graph.weight(f"{name}.position_embedding.weight"))


def _mask(graph: Graph, length: int) -> str:
    """What is added to the scores, (B, 1, L, L) fp32: 0 for tokens up to the own one that attention_mask keeps, else
    the lowest number. Not -inf: a row that may see nothing then comes out as the mean of all, not as NaN."""
    causal = graph.constant(f"causal[{length}]", np.tri(length, dtype=np.bool_)[None, None])
    kept = graph.node("Cast", "attention_mask/kept", "attention_mask", to=TensorProto.BOOL)
    kept = graph.node("Reshape", "attention_mask/keys", kept, graph.integers(-1, 1, 1, length))
    visible = graph.node("And", "attention_mask/visible", causal, kept)
    lowest = graph.lowest()  # of the compute type: where attention is one operator, it may add this in that type
    with graph.island():
        lowest = graph.node("Cast", "attention_mask/lowest", lowest, to=graph.type) if graph.halved else lowest
        return graph.node("Where", "attention_mask/bias", visible, graph.scalar(0.0), lowest)


def _layer(graph: Graph, config: TextEncoderConfig, name: str, rows: str, mask: str) -> str:
    """One pre-norm transformer layer, (B*L, c) -> (B*L, c)."""
    normed = _norm(graph, config, f"{name}.layer_norm1", rows)
    mixed = attention(
        graph,
        f"{name}.self_attn",
        normed,
        config.hidden_size,
        config.num_attention_heads,
        projections=("q_proj", "k_proj", "v_proj", "out_proj"),
        mask=mask,
    )
    rows = graph.node("Add", f"{name}/attended", rows, mixed)
    hidden = graph.linear(f"{name}.mlp.fc1", _norm(graph, config, f"{name}.layer_norm2", rows))
    hidden = graph.linear(f"{name}.mlp.fc2", _activation(graph, config, f"{name}.mlp.activation_fn", hidden))
    return graph.node("Add", name, rows, hidden)


def _activation(graph: Graph, config: TextEncoderConfig, name: str, value: str) -> str:
    if config.hidden_act == "gelu":
        return graph.node("Gelu", name, value)
    scaled = graph.node("Mul", f"{name}/scaled", value, graph.scalar(QUICK_GELU))
    return graph.node("Mul", name, value, graph.node("Sigmoid", f"{name}/sigmoid", scaled))


def _norm(graph: Graph, config: TextEncoderConfig, name: str, value: str) -> str:
    scale, shift = graph.weight(f"{name}.weight"), graph.weight(f"{name}.bias")
    return graph.layer_norm(name, value, config.hidden_size, eps=config.layer_norm_eps, scale=scale, shift=shift)


def _pool(graph: Graph, config: TextEncoderConfig) -> str:
    """The row of the first end token, normed and projected: (B, 1, p). Norming the picked row alone is enough."""
    ids = graph.node("Cast", "pooled/ids", "input_ids", to=TensorProto.INT32)
    if config.eos_token_id != LEGACY_EOS:
        end = graph.constant(f"int32[{config.eos_token_id}]", np.array(config.eos_token_id, np.int32))
        ids = graph.node("Cast", "pooled/ends", graph.node("Equal", "pooled/is_end", ids, end), to=TensorProto.INT32)
    index = graph.node("ArgMax", "pooled/index", ids, axis=1, keepdims=1)  # (B, 1), the first of equal ones
    row = graph.node("GatherND", "pooled/row", "prompt_embeds", index, batch_dims=1)  # (B, c)
    projected = graph.linear("text_projection", _norm(graph, config, "text_model.final_layer_norm", row), bias=False)
    return graph.node("Reshape", "pooled", projected, graph.integers(-1, 1, config.projection_dim))
