"""Stage B as a graph: the prior's latents (effnet) and the pooled text condition the pyramid."""

import onnx

from ...schemas.errors import ExportError
from ...schemas.stages import UNetConfig
from .builder import Graph
from .layers import Image, normalised, pointwise, resized
from .unet import NORM_EPS, Pyramid, check_supported, classify, conditions, embed, pooled_tokens


def write_decoder(graph: Graph, config: UNetConfig) -> onnx.ModelProto:
    """The decoder: any latent size its levels can halve, any size of effnet.

    Raises ExportError for settings of no release and for missing weights."""
    check_supported(config)
    if config.effnet_in_channels is None or config.pixel_mapper_in_channels is None:
        raise ExportError("decoder: its config must have effnet_in_channels and pixel_mapper_in_channels")
    image = embed(graph, config, "sample")
    effnet = resized(graph, "effnet/resized", Image(graph, config.effnet_in_channels, first="effnet"), image.size)
    image = image.with_last(graph.node("Add", "embedding/effnet", image.last, _mapped(graph, effnet).last))
    image = image.with_last(graph.node("Add", "embedding/pixels", image.last, _pixels(graph)))
    pyramid = Pyramid(graph, config, conditions(graph, config, "timestep_ratio", pooled_tokens(graph, config)))
    classify(graph, config, pyramid.write(image), "noise_pred")
    return graph.model("decoder", "Stable Cascade stage B (decoder): latents and conditioning to predicted noise")


def _mapped(graph: Graph, effnet: Image) -> Image:
    """effnet_mapper: (B, 16, h, w) -> (B, c, h, w)"""
    hidden = pointwise(graph, "effnet_mapper.0", effnet)
    hidden = hidden.with_last(graph.node("Gelu", "effnet_mapper.1", hidden.last))
    return normalised(graph, "effnet_mapper.3", pointwise(graph, "effnet_mapper.2", hidden), NORM_EPS)


def _pixels(graph: Graph) -> str:
    """pixels_mapper of black pixels, resized: (1, c). diffusers maps zeros (B, 3, 8, 8) where no pixels are given,
    as all pipelines do. Zeros leave of the first convolution its bias, the same everywhere, and resizing a constant
    changes nothing; so one pixel is mapped, and the first convolution's weight is not read."""
    wide, width = graph.width("pixels_mapper.0"), graph.width("pixels_mapper.2")
    hidden = graph.node("Gelu", "pixels_mapper.1", graph.weight("pixels_mapper.0.bias", (1, wide)))
    return graph.layer_norm("pixels_mapper.3", graph.linear("pixels_mapper.2", hidden), width, eps=NORM_EPS)
