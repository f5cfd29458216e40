"""Stage A as two graphs: the VQGAN's decoder with scaling and clamp, and its encoder without them.

Semantics: diffusers ``PaellaVQModel`` (pipelines/deprecated/wuerstchen/modeling_paella_vq_model.py), ``encode``, and
``decode`` without quantisation, like in the pipelines.
"""

import onnx

from ...schemas.fp16 import VQGAN_ENCODER_STREAM, VQGAN_STREAM
from ...schemas.stages import VQGANConfig
from .graph import Graph
from .layers import (
    Image,
    batch_normalised,
    convolution,
    edge_padded,
    pixel_shuffle,
    pointwise,
    transposed_convolution,
)

NORM_EPS = 1e-6


def write_vqgan(graph: Graph, config: VQGANConfig) -> onnx.ModelProto:
    """latents (B, 4, h, w) -> images in 0..1, 4 times as high and wide in the releases.

    With an exponent k, the image holds 2^-k of its values from the first to the last Linear. Raises ExportError for
    missing weights of the decoder; those of the encoder are not needed."""
    k = graph.options.exponents.get(VQGAN_STREAM, 0)
    scaled = graph.node("Mul", "latents/scaled", "latents", graph.scalar(config.scale_factor))
    latents = Image(graph, config.latent_channels, first=scaled)
    image = pointwise(graph, "up_blocks.0.0", latents, exponent=k, bias_exponent=k)
    index = 1
    for level in reversed(range(config.levels)):
        for _ in range(config.bottleneck_blocks if level == config.levels - 1 else 1):
            image = _block(graph, f"up_blocks.{index}", image, k)
            index += 1
        if level > 0:
            shape = {"strides": [2, 2], "pads": [1] * 4}
            name, width = f"up_blocks.{index}", config.widths[level - 1]
            image = transposed_convolution(graph, name, image, width, bias_exponent=k, **shape)
            graph.probe(image.first)
            index += 1
    pixels = pointwise(graph, "out_block.0", image, alpha=2.0**k)
    decoded = pixel_shuffle(graph, "out_block.1", pixels, config.up_down_scale_factor)
    graph.write_images(decoded)
    return graph.model("vqgan", "Stable Cascade stage A (VQGAN decoder): latents to images in 0..1")


def write_vqgan_encoder(graph: Graph, config: VQGANConfig) -> onnx.ModelProto:
    """images (B, 3, H, W) in 0..1 -> latents, 4 times smaller in the releases.

    The latents of stage B are these, divided by the scale factor. With an exponent k, the image holds 2^-k of its
    values from the first convolution to the last Linear. Raises ExportError for missing weights of the encoder; those
    of the decoder are not needed."""
    k = graph.options.exponents.get(VQGAN_ENCODER_STREAM, 0)
    image = _unshuffled(graph, "in_block.1", config, k)
    graph.probe(image.first)
    index = 0
    for level, width in enumerate(config.widths):
        if level > 0:
            name = f"down_blocks.{index}"
            image = convolution(graph, name, image.first, width, bias_exponent=k, strides=[2, 2], pads=[1] * 4)
            graph.probe(image.first)
            index += 1
        image = _block(graph, f"down_blocks.{index}", image, k)
        index += 1
    latents = pointwise(graph, f"down_blocks.{index}.0", image, bias=False, alpha=2.0**k)
    graph.probe(latents.last)
    graph.node("Identity", "latents", batch_normalised(graph, f"down_blocks.{index}.1", latents).first)
    return graph.model("vqgan_encoder", "Stable Cascade stage A (VQGAN encoder): images in 0..1 to unscaled latents")


def _unshuffled(graph: Graph, name: str, config: VQGANConfig, k: int) -> Image:
    """PixelUnshuffle and the 1x1 convolution `name` after it, as one convolution with a stride, times 2^-`k`.

    The unshuffled channels count (in, dy, dx), which is the order of the weight's bytes."""
    patch, width = config.up_down_scale_factor, config.widths[0]
    dims = (width, config.in_channels, patch, patch)
    strides = [patch, patch]
    return convolution(graph, name, "images", width, dims=dims, exponent=k, bias_exponent=k, strides=strides)


def _block(graph: Graph, name: str, image: Image, k: int = 0) -> Image:
    """MixingResidualBlock: a depthwise and a channelwise branch, modulated by six learned numbers.

    The image and the results of both branches hold 2^-`k` of their values."""
    with graph.island():  # constants: ONNX Runtime folds them in fp32 only
        gammas = graph.split(f"{name}/gammas", graph.weight(f"{name}.gammas"), axis=0, parts=6)
    spatial = _modulated(graph, f"{name}.norm1", image, (gammas[0], gammas[1]), k)
    padded = edge_padded(graph, f"{name}.depthwise.0", spatial)
    spatial = convolution(
        graph,
        f"{name}.depthwise.1",
        padded,
        image.channels,
        size=image.size,
        exponent=k,
        bias_exponent=k,
        group=image.channels,
    )
    graph.probe(spatial.first)
    image = _added(graph, f"{name}/mixed", image, spatial, gammas[2])
    graph.probe(image.last)

    channels = _modulated(graph, f"{name}.norm2", image, (gammas[3], gammas[4]), k)
    rows = graph.activated(f"{name}.channelwise.0", f"{name}.channelwise.1", channels.rows)
    graph.probe(rows)
    rows = graph.linear(f"{name}.channelwise.2", rows, exponent=k, bias_exponent=k)
    graph.probe(rows)
    image = _added(graph, name, image, image.with_rows(rows), gammas[5])
    graph.probe(image.last)
    return image


def _modulated(graph: Graph, name: str, image: Image, gammas: tuple[str, str], k: int) -> Image:
    """norm(x) * (1 + gain) + shift, as scale and shift of the LayerNorm itself; `gammas` are gain and shift."""
    gain, shift = gammas
    with graph.island():
        ones = graph.full(image.channels)
        one_more = graph.node("Add", f"{name}/one_more", gain, graph.scalar(1.0))
        scale = graph.node("Mul", f"{name}/scale", ones, one_more)
        shift = graph.node("Mul", f"{name}/shift", ones, shift)
    scale, shift = graph.to_compute(scale), graph.to_compute(shift)
    eps = NORM_EPS * 4.0**-k
    return image.with_last(graph.layer_norm(name, image.last, image.channels, eps=eps, scale=scale, shift=shift))


def _added(graph: Graph, name: str, image: Image, branch: Image, factor: str) -> Image:
    scaled = graph.node("Mul", f"{name}/branch", branch.last, graph.to_compute(factor))
    return image.with_last(graph.node("Add", name, image.last, scaled))
