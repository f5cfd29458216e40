"""Stage B as graphs: the prior's latents (effnet) and the pooled text condition the pyramid."""

import onnx

from ...schemas.errors import ExportError
from ...schemas.hoisted import EFFNET_MAP, RATIOS
from ...schemas.stages import UNetConfig
from .conditions import Computed, FedConditions, clip_tokens, pooled_tokens, timestep_embedding, write_conditions
from .graph import Graph
from .layers import Image, normalised, pointwise, resized
from .streams import NORM_EPS, Streams
from .unet import OUTERMOST, Pyramid, check_supported, embed


def write_decoder(graph: Graph, config: UNetConfig) -> onnx.ModelProto:
    """The decoder, for any latent size that its levels can halve and any size of effnet.

    Raises ExportError for settings that no release has, and for missing weights."""
    streams = _streams(graph, config)
    image = embed(graph, config, streams, "sample")
    image = _with_effnet(graph, image, _effnet_map(graph, config, streams, image.size))
    conditions = _computed(graph, config, streams, "timestep_ratio")
    return _finish(Pyramid(graph, config, streams, conditions), image, "decoder")


def write_decoder_conditioning(graph: Graph, config: UNetConfig) -> onnx.ModelProto:
    """The part of the decoder that depends only on prior latents, text and schedule; see ``schemas.hoisted``."""
    streams = _streams(graph, config)
    # The pooled values are not used: onnx's shape inference follows sizes through pooling, not through a division.
    patch = [config.patch_size] * 2
    pooled = graph.node("AveragePool", "embedding/patches", "sample", kernel_shape=patch, strides=patch)
    size = graph.node("Shape", "embedding/size", pooled, start=2)
    _effnet_map(graph, config, streams, size)
    write_conditions(graph, config, _computed(graph, config, streams, RATIOS))
    doc = "Stable Cascade stage B (decoder): stage C's latents, text and schedule to conditions"
    return graph.model("decoder_conditioning", doc)


def write_decoder_step(graph: Graph, config: UNetConfig) -> onnx.ModelProto:
    """The rest of the decoder."""
    streams = _streams(graph, config)
    image = embed(graph, config, streams, "sample")
    image = _with_effnet(graph, image, EFFNET_MAP)
    return _finish(Pyramid(graph, config, streams, FedConditions(graph, config, streams)), image, "decoder_step")


def _streams(graph: Graph, config: UNetConfig) -> Streams:
    check_supported(config)
    if config.effnet_in_channels is None or config.pixel_mapper_in_channels is None:
        raise ExportError("decoder: its config must have effnet_in_channels and pixel_mapper_in_channels")
    if graph.options.control:
        raise ExportError("decoder: ControlNets are for the prior")
    return Streams(config, graph.options.exponents)


def _computed(graph: Graph, config: UNetConfig, streams: Streams, ratios: str) -> Computed:
    tokens = clip_tokens(graph, config, pooled_tokens(graph, config))
    return Computed(graph, config, streams, timestep_embedding(graph, config, ratios), tokens)


def _finish(pyramid: Pyramid, image: Image, name: str) -> onnx.ModelProto:
    pyramid.write(image)
    return pyramid.graph.model(name, "Stable Cascade stage B (decoder): latents and conditioning to predicted noise")


def _with_effnet(graph: Graph, image: Image, effnet_map: str) -> Image:
    return image.with_last(graph.node("Add", "embedding/effnet", image.last, effnet_map))


def _effnet_map(graph: Graph, config: UNetConfig, streams: Streams, size: str) -> str:
    """The term (B, h, w, c) that is added to the embedded sample of `size`.

    It is effnet (B, 16, eh, ew), resized and mapped, plus the constant of the empty pixels."""
    effnet = resized(graph, "effnet/resized", Image(graph, config.effnet_in_channels or 0, first="effnet"), size)
    hidden = pointwise(graph, "effnet_mapper.0", effnet)
    hidden = hidden.with_last(graph.node("Gelu", "effnet_mapper.1", hidden.last))
    mapped = pointwise(graph, "effnet_mapper.2", hidden)
    mapped = normalised(graph, "effnet_mapper.3", mapped, out=streams.of(OUTERMOST))
    return graph.node("Add", EFFNET_MAP, mapped.last, _pixels(graph, streams))


def _pixels(graph: Graph, streams: Streams) -> str:
    """pixels_mapper of black pixels: (1, c).

    No pipeline gives pixels, and diffusers then maps zeros (B, 3, 8, 8). The first convolution of zeros is its bias at
    every pixel, so one pixel is mapped and the convolution's weight is not read."""
    wide, width = graph.width("pixels_mapper.0"), graph.width("pixels_mapper.2")
    with graph.island():  # a constant: ONNX Runtime folds it in fp32 only
        hidden = graph.node("Gelu", "pixels_mapper.1", graph.weight("pixels_mapper.0.bias", (1, wide)))
        mapped = graph.linear("pixels_mapper.2", hidden)
        scale = graph.full(width, 2.0 ** -streams.of(OUTERMOST))
        normed = graph.layer_norm("pixels_mapper.3", mapped, width, eps=NORM_EPS, scale=scale)
    return graph.to_compute(normed)
