"""Stage C as graphs: text, pooled text and image embeddings condition the pyramid."""

import onnx

from ...schemas.control import controlled_blocks
from ...schemas.errors import ExportError
from ...schemas.hoisted import RATIOS
from ...schemas.stages import UNetConfig
from .conditions import (
    Computed,
    Conditions,
    FedConditions,
    clip_tokens,
    pooled_tokens,
    timestep_embedding,
    write_conditions,
)
from .graph import Graph
from .streams import Streams
from .unet import Pyramid, check_supported, embed


def write_prior(graph: Graph, config: UNetConfig) -> onnx.ModelProto:
    """The prior, for any latent size, number of text tokens and number of image embeddings.

    Raises ExportError for a config without text or image conditioning, and for missing weights."""
    streams = _streams(graph, config)
    return _finish(graph, config, streams, _computed(graph, config, streams, "timestep_ratio"), "prior")


def write_prior_conditioning(graph: Graph, config: UNetConfig) -> onnx.ModelProto:
    """The part of the prior that depends only on text, images and schedule; see ``schemas.hoisted``."""
    streams = _streams(graph, config)
    write_conditions(graph, config, _computed(graph, config, streams, RATIOS))
    return graph.model("prior_conditioning", "Stable Cascade stage C (prior): text, images and schedule to conditions")


def write_prior_step(graph: Graph, config: UNetConfig) -> onnx.ModelProto:
    """The rest of the prior."""
    streams = _streams(graph, config)
    return _finish(graph, config, streams, FedConditions(graph, config, streams), "prior_step")


def _streams(graph: Graph, config: UNetConfig) -> Streams:
    check_supported(config)
    if config.clip_text_in_channels is None or config.clip_image_in_channels is None:
        raise ExportError("prior: its config must have clip_text_in_channels and clip_image_in_channels")
    return Streams(config, graph.options.exponents)


def _computed(graph: Graph, config: UNetConfig, streams: Streams, ratios: str) -> Computed:
    tokens = graph.node(
        "Concat",
        "clip_tokens",
        _tokens(graph, config, "clip_txt_mapper", "clip_text", config.clip_text_in_channels or 0),
        pooled_tokens(graph, config),
        _tokens(graph, config, "clip_img_mapper", "clip_img", config.clip_image_in_channels or 0),
        axis=1,
    )
    timestep = timestep_embedding(graph, config, ratios)
    return Computed(graph, config, streams, timestep, clip_tokens(graph, config, tokens))


def _tokens(graph: Graph, config: UNetConfig, mapper: str, embeddings: str, channels: int) -> str:
    """(B, n, channels) -> (B, n*k, conditioning_dim); the image mapper gives k = clip_seq tokens for one embedding."""
    mapped = graph.linear(mapper, graph.rows(embeddings, channels))
    return graph.node("Reshape", f"{mapper}/tokens", mapped, graph.shape(graph.batch, -1, config.conditioning_dim))


def _finish(graph: Graph, config: UNetConfig, streams: Streams, conditions: Conditions, name: str) -> onnx.ModelProto:
    control = controlled_blocks(config, graph.options.control)
    Pyramid(graph, config, streams, conditions, control).write(embed(graph, config, streams, "sample"))
    return graph.model(name, "Stable Cascade stage C (prior): latents and conditioning to predicted noise")
