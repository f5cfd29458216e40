"""ONNX graphs written node by node from a network's config; nothing is traced.

``write_graph`` gives a model whose weights are external data: byte ranges of files beside it, by reference.
"""

from collections.abc import Mapping

import onnx

from ...schemas.ports import ports_of, vqgan_encoder_ports
from ...schemas.stages import (
    ControlNetConfig,
    EffnetEncoderConfig,
    ImageEncoderConfig,
    NetworkConfig,
    PreviewerConfig,
    Stage,
    TextEncoderConfig,
    UNetConfig,
    VQGANConfig,
)
from ...schemas.tensors import expected_tensors
from .builder import IR_VERSION, OPSET, Graph, Weight
from .controlnet import write_controlnet
from .decoder import write_decoder
from .effnet_encoder import write_effnet_encoder
from .image_encoder import write_image_encoder
from .previewer import write_previewer
from .prior import write_prior
from .text_encoder import write_text_encoder
from .vqgan import write_vqgan, write_vqgan_encoder

__all__ = ["IR_VERSION", "OPSET", "Weight", "write_graph", "write_vqgan_encoder_graph"]


def write_graph(config: NetworkConfig, weights: Mapping[str, Weight]) -> onnx.ModelProto:
    """The graph of the network that `config` describes, with the ports of ``schemas.ports``.

    `weights` by their diffusers names; those the graph does not need are ignored. It computes in fp32 whatever they
    are stored in, and loads with onnxruntime 1.19 and later. Save it with ``onnx.save`` into the folder that the
    weights' locations are relative to.

    Raises ExportError, naming all of them, when weights are missing or not what the config says, and for configs
    no graph is written for. Of the vqgan it is the decoder half.
    """
    graph = Graph(ports_of(config), expected_tensors(config), weights)
    match config:
        case UNetConfig() if config.stage is Stage.PRIOR:
            return write_prior(graph, config)
        case UNetConfig():
            return write_decoder(graph, config)
        case VQGANConfig():
            return write_vqgan(graph, config)
        case TextEncoderConfig():
            return write_text_encoder(graph, config)
        case ImageEncoderConfig():
            return write_image_encoder(graph, config)
        case EffnetEncoderConfig():
            return write_effnet_encoder(graph, config)
        case PreviewerConfig():
            return write_previewer(graph, config)
        case ControlNetConfig():
            return write_controlnet(graph, config)


def write_vqgan_encoder_graph(config: VQGANConfig, weights: Mapping[str, Weight]) -> onnx.ModelProto:
    """The graph of the vqgan's encoder half, with the ports of ``vqgan_encoder_ports``; otherwise like `write_graph`.

    `weights` are the whole component's: both graphs may refer to one file."""
    return write_vqgan_encoder(Graph(vqgan_encoder_ports(config), expected_tensors(config), weights), config)
