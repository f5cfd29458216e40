"""EfficientNetV2-S as part of a graph, channels first throughout.

Semantics: torchvision ``efficientnet_v2_s().features`` in eval mode (models/efficientnet.py).
"""

from typing import Any

from ...schemas.layer_tensors import (
    EFFICIENTNET_EPSILON,
    EFFICIENTNET_HEAD,
    InvertedResidual,
    inverted_residuals,
)
from ...schemas.stages import ControlNetConfig, EffnetEncoderConfig
from .graph import Graph
from .layers import Image, batch_normalised, channel_means, convolution

PADS = (1, 1, 1, 1)  # keep the size in a 3x3 convolution


def efficientnet_v2(
    graph: Graph, config: EffnetEncoderConfig | ControlNetConfig, image: Image, *, padded: bool = True
) -> Image:
    """The backbone of `config`. Its first convolution is `padded`, except the one of a ControlNet with other inputs."""
    name, widths = "backbone", config.backbone_widths
    pads = PADS if padded else (0, 0, 0, 0)
    image = _conv_norm(graph, f"{name}.0", image, widths[0], strides=[2, 2], pads=pads)
    for block in inverted_residuals(widths, config.backbone_blocks):
        image = _block(graph, f"{name}.{block.path}", block, image)
    return _conv_norm(graph, f"{name}.{EFFICIENTNET_HEAD}", image, widths[-1])


def _block(graph: Graph, name: str, block: InvertedResidual, image: Image) -> Image:
    made = (_fused if block.fused else _depthwise)(graph, f"{name}.block", block, image)
    if not block.has_skip:
        return made
    return Image(graph, block.out, first=graph.node("Add", name, made.first, image.first))


def _fused(graph: Graph, name: str, block: InvertedResidual, image: Image) -> Image:
    strides = [block.stride] * 2
    if block.expansion == 1:
        return _conv_norm(graph, f"{name}.0", image, block.out, strides=strides, pads=PADS)
    image = _conv_norm(graph, f"{name}.0", image, block.inner, strides=strides, pads=PADS)
    return _conv_norm(graph, f"{name}.1", image, block.out, active=False)


def _depthwise(graph: Graph, name: str, block: InvertedResidual, image: Image) -> Image:
    inner, strides = block.inner, [block.stride] * 2
    image = _conv_norm(graph, f"{name}.0", image, inner)
    image = _conv_norm(graph, f"{name}.1", image, inner, group=inner, strides=strides, pads=PADS)
    image = _squeeze_excitation(graph, f"{name}.2", block, image)
    return _conv_norm(graph, f"{name}.3", image, block.out, active=False)


def _squeeze_excitation(graph: Graph, name: str, block: InvertedResidual, image: Image) -> Image:
    """Scale each channel by a factor that a perceptron computes from the means of all channels."""
    means = channel_means(graph, f"{name}.avgpool", image)
    hidden = convolution(graph, f"{name}.fc1", means, block.squeezed)
    hidden = convolution(graph, f"{name}.fc2", graph.silu(f"{name}.activation", hidden.first), block.inner)
    scale = graph.node("Sigmoid", f"{name}.scale_activation", hidden.first)
    return Image(graph, block.inner, first=graph.node("Mul", name, scale, image.first))


def _conv_norm(graph: Graph, name: str, image: Image, out: int, *, active: bool = True, **attributes: Any) -> Image:
    """A convolution without bias, its BatchNorm, and a SiLU unless it is not `active`."""
    made = convolution(graph, f"{name}.0", image.first, out, bias=False, **attributes)
    made = batch_normalised(graph, f"{name}.1", made, EFFICIENTNET_EPSILON)
    return Image(graph, out, first=graph.silu(f"{name}.2", made.first)) if active else made
