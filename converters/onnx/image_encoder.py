"""The CLIP image encoder as a graph.

Semantics: transformers ``CLIPVisionModelWithProjection`` (models/clip/modeling_clip.py) with eager attention.
"""

import numpy as np
import onnx

from ...schemas.stages import ImageEncoderConfig
from .clip import check_supported, norm, transformer_layer
from .graph import Graph
from .layers import convolution


def write_image_encoder(graph: Graph, config: ImageEncoderConfig) -> onnx.ModelProto:
    """pixel_values (B, 3, s, s) -> image_embeds, the projected row of the class token.

    Raises ExportError for an activation CLIP does not use, indivisible heads, and missing weights."""
    check_supported(config)
    width, model = config.hidden_size, "vision_model"
    rows = graph.rows(norm(graph, config, f"{model}.pre_layrnorm", _embeddings(graph, config)), width)
    for layer in range(config.num_hidden_layers):
        rows = transformer_layer(graph, config, f"{model}.encoder.layers.{layer}", rows, mask=None)
    tokens = graph.node("Reshape", f"{model}.encoder", rows, graph.integers(-1, _tokens(config), width))
    first = graph.node("Gather", "class_token", tokens, graph.constant("int64[]=0", np.array(0)), axis=1)  # (B, c)
    projected = graph.linear("visual_projection", norm(graph, config, f"{model}.post_layernorm", first), bias=False)
    graph.node("Identity", "image_embeds", projected)
    return graph.model("image_encoder", "CLIP image encoder with projection: prepared pixels to image_embeds")


def _tokens(config: ImageEncoderConfig) -> int:
    return int((config.image_size // config.patch_size) ** 2 + 1)


def _embeddings(graph: Graph, config: ImageEncoderConfig) -> str:
    """The class token and the patches, plus positions: (B, tokens, c)."""
    name, width, patch = "vision_model.embeddings", config.hidden_size, config.patch_size
    patches = convolution(graph, f"{name}.patch_embedding", "pixel_values", width, bias=False, strides=[patch, patch])
    rows = graph.node("Reshape", f"{name}/patches", patches.last, graph.shape(graph.batch, -1, width))
    token = graph.weight(f"{name}.class_embedding", (1, 1, width))
    token = graph.node("Expand", f"{name}/class", token, graph.shape(graph.batch, 1, width))
    tokens = graph.node("Concat", f"{name}/tokens", token, rows, axis=1)
    return graph.node("Add", name, tokens, graph.weight(f"{name}.position_embedding.weight"))
