"""The semantic compressor as a graph: an image to latents of the prior."""

import onnx

from ...schemas.stages import EffnetEncoderConfig
from .efficientnet import efficientnet_v2
from .graph import Graph
from .layers import Image, batch_normalised, convolution


def write_effnet_encoder(graph: Graph, config: EffnetEncoderConfig) -> onnx.ModelProto:
    """pixels (B, 3, H, W), normalised by the caller, -> effnet, 32 times smaller, rounded up.

    Raises ExportError for missing weights."""
    seen = efficientnet_v2(graph, config, Image(graph, 3, first="pixels"))
    mapped = convolution(graph, "mapper.0", seen.first, config.c_latent, bias=False)
    graph.node("Identity", "effnet", batch_normalised(graph, "mapper.1", mapped, learned=False).first)
    return graph.model("effnet_encoder", "Stable Cascade semantic compressor: normalised pixels to latents of stage C")
