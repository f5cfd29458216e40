"""The CLIP text encoder as a graph.

Semantics: transformers ``CLIPTextModelWithProjection`` (models/clip/modeling_clip.py) with eager attention.
"""

import numpy as np
import onnx
from onnx import TensorProto

from ...schemas.stages import TextEncoderConfig
from .clip import check_supported, norm, transformer_layer
from .external_weights import STORAGE_TYPES
from .graph import Graph
from .graph_builder import TYPE_NAMES

LEGACY_EOS = 2  # in configs written before transformers 4.31, where the end token has the highest id


def write_text_encoder(graph: Graph, config: TextEncoderConfig) -> onnx.ModelProto:
    """input_ids and attention_mask (B, 77) -> prompt_embeds, the last layer's output before the final norm, and
    pooled, the projected row of the end token.

    Raises ExportError for an activation CLIP does not use, indivisible heads, and missing weights."""
    check_supported(config)
    width, length = config.hidden_size, config.max_position_embeddings
    rows = graph.rows(_embeddings(graph), width)
    mask = _mask(graph, length)
    for layer in range(config.num_hidden_layers):
        rows = transformer_layer(graph, config, f"text_model.encoder.layers.{layer}", rows, mask)
    graph.node("Reshape", "prompt_embeds", rows, graph.integers(-1, length, width))
    _pool(graph, config)
    return graph.model("text_encoder", "CLIP text encoder with projection: token ids to prompt_embeds and pooled")


def _embeddings(graph: Graph) -> str:
    """Token plus position embeddings, (B, L, c). Rows of a table in half precision are cast after they are picked."""
    name = "text_model.embeddings"
    table, dtype = graph.stored(f"{name}.token_embedding.weight")
    tokens = graph.node("Gather", f"{name}.token_embedding", table, "input_ids", axis=0)
    if STORAGE_TYPES.get(dtype) != graph.type:
        tokens = graph.node("Cast", f"{name}.token_embedding/{TYPE_NAMES[graph.type]}", tokens, to=graph.type)
    return graph.node("Add", name, tokens, graph.weight(f"{name}.position_embedding.weight"))


def _mask(graph: Graph, length: int) -> str:
    """The mask (B, 1, L, L) fp32 that is added to the scores.

    It is 0 for each token that attention_mask keeps, up to the token of the row, and the lowest number for others.
    With -inf a row whose tokens are all masked would be NaN; now it is the mean of all tokens."""
    causal = graph.constant(f"causal[{length}]", np.tri(length, dtype=np.bool_)[None, None])
    kept = graph.node("Cast", "attention_mask/kept", "attention_mask", to=TensorProto.BOOL)
    kept = graph.node("Reshape", "attention_mask/keys", kept, graph.integers(-1, 1, 1, length))
    visible = graph.node("And", "attention_mask/visible", causal, kept)
    lowest = graph.lowest()  # of the compute type, in which the Attention operator may add the mask
    with graph.island():
        lowest = graph.node("Cast", "attention_mask/lowest", lowest, to=graph.type) if graph.halved else lowest
        return graph.node("Where", "attention_mask/bias", visible, graph.scalar(0.0), lowest)


def _pool(graph: Graph, config: TextEncoderConfig) -> str:
    """The row of the first end token, normalised and projected: (B, 1, p)."""
    length = config.max_position_embeddings
    ids = graph.node("Cast", "pooled/ids", "input_ids", to=TensorProto.INT32)
    if config.eos_token_id == LEGACY_EOS:
        end = graph.node("ReduceMax", "pooled/end", ids, graph.integers(1), keepdims=1)
    else:
        end = graph.constant(f"int32[{config.eos_token_id}]", np.array(config.eos_token_id, np.int32))
    ends = graph.node("Cast", "pooled/ends", graph.node("Equal", "pooled/is_end", ids, end), to=TensorProto.FLOAT)
    # Earlier ends count more: GPUs have ArgMax for floats only, and need not return the first of equal ones.
    order = graph.constant(f"descending[{length}]", np.arange(length, 0, -1, dtype=np.float32)[None])
    ranked = graph.node("Mul", "pooled/ranked", ends, order)
    index = graph.node("ArgMax", "pooled/index", ranked, axis=1, keepdims=1)  # (B, 1)
    row = graph.node("GatherND", "pooled/row", "prompt_embeds", index, batch_dims=1)  # (B, c)
    projected = graph.linear("text_projection", norm(graph, config, "text_model.final_layer_norm", row), bias=False)
    return graph.node("Reshape", "pooled", projected, graph.integers(-1, 1, config.projection_dim))
