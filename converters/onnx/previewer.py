"""The previewer as a graph: the prior's latents to a small image, channels first throughout."""

import onnx

from ...schemas.stages import PreviewerConfig
from .graph import Graph
from .layers import Image, batch_normalised, convolution, transposed_convolution


def write_previewer(graph: Graph, config: PreviewerConfig) -> onnx.ModelProto:
    """latents (B, 16, h, w) -> images in 0..1, 8 times as high and wide.

    Raises ExportError for missing weights."""
    image = Image(graph, config.c_in, first="latents")
    for doublings, width in enumerate(config.widths):
        entrance, smoothing = 6 * doublings, 6 * doublings + 3
        if doublings:
            image = transposed_convolution(graph, f"blocks.{entrance}", image, width, strides=[2, 2])
        else:
            image = convolution(graph, f"blocks.{entrance}", image.first, width)
        image = _activated(graph, entrance, image)
        image = convolution(graph, f"blocks.{smoothing}", image.first, width, pads=[1] * 4)
        image = _activated(graph, smoothing, image)
    pixels = convolution(graph, f"blocks.{6 * len(config.widths)}", image.first, config.c_out)
    graph.write_images(pixels.first)
    return graph.model("previewer", "Stable Cascade previewer: latents of stage C to small images in 0..1")


def _activated(graph: Graph, position: int, image: Image) -> Image:
    """The GELU and the BatchNorm after the convolution ``blocks.position``."""
    active = graph.node("Gelu", f"blocks.{position + 1}", image.first)
    return batch_normalised(graph, f"blocks.{position + 2}", Image(graph, image.channels, first=active))
