"""The ControlNets as graphs: a control image to residuals, which are added before the prior's residual blocks."""

import onnx

from ...schemas.ports import control_port
from ...schemas.stages import ControlNetConfig
from ...schemas.tensors import LARGE_BLOCKS, LARGE_ENTRANCE, LARGE_WIDTH
from .efficientnet import PADS, efficientnet_v2
from .graph import Graph
from .layers import Image, convolution, leaky_relu, pixel_shuffle, pointwise

NORM_EPS = 1e-5
NEGATIVE_SLOPE = 0.2  # of every LeakyReLU; no checkpoint has it


def write_controlnet(graph: Graph, config: ControlNetConfig) -> onnx.ModelProto:
    """control_image (B, c_in, H, W) -> control.N (B, c_proj, h, w) for each N of proj_blocks.

    Raises ExportError for missing weights."""
    image = Image(graph, config.c_in, first="control_image")
    match config.bottleneck_mode:
        case None:
            seen = efficientnet_v2(graph, config, image, padded=config.c_in == 3)
        case "large":
            seen = _large(graph, image)
        case "simple":
            seen = _simple(graph, image)
    for position, block in enumerate(config.proj_blocks):
        _projected(graph, f"projections.{position}", seen, control_port(block))
    return graph.model(
        config.stage, f"Stable Cascade {config.stage}: a control image to additions to blocks of stage C"
    )


def _projected(graph: Graph, name: str, seen: Image, port: str) -> None:
    rows = graph.linear(f"{name}.0", seen.rows, bias=False)
    rows = leaky_relu(graph, f"{name}.1", rows, NEGATIVE_SLOPE)
    rows = graph.linear(f"{name}.2", rows, bias=False)
    pixel_shuffle(graph, port, seen.with_rows(rows, graph.width(f"{name}.2")), factor=1)


def _simple(graph: Graph, image: Image) -> Image:
    wide = convolution(graph, "backbone.0", image.first, 4 * image.channels, size=image.size, pads=PADS)
    active = leaky_relu(graph, "backbone.1", wide.first, NEGATIVE_SLOPE)
    return convolution(graph, "backbone.2", active, image.channels, size=image.size, pads=PADS)


def _large(graph: Graph, image: Image) -> Image:
    wide = graph.linear("backbone.0", image.rows)
    active = leaky_relu(graph, "backbone.1", wide, NEGATIVE_SLOPE)
    image = pointwise(graph, "backbone.2", image.with_rows(active, LARGE_ENTRANCE))
    for index in range(3, 3 + LARGE_BLOCKS):
        image = _normed_convolutions(graph, f"backbone.{index}", image)
    return pointwise(graph, f"backbone.{3 + LARGE_BLOCKS}", image)


def _normed_convolutions(graph: Graph, name: str, image: Image) -> Image:
    """LayerNorm over the channels, GELU and a 3x3 convolution, twice, with a skip connection around them."""
    branch = image
    for first in (0, 3):
        norm, gelu, conv = (f"{name}.blocks.{first + step}" for step in range(3))
        scale, shift = graph.weight(f"{norm}.weight"), graph.weight(f"{norm}.bias")
        value = graph.layer_norm(norm, branch.last, LARGE_WIDTH, eps=NORM_EPS, scale=scale, shift=shift)
        branch = image.with_last(graph.node("Gelu", gelu, value))
        branch = convolution(graph, conv, branch.first, LARGE_WIDTH, size=image.size, pads=PADS)
    return image.with_last(graph.node("Add", name, image.last, branch.last))
