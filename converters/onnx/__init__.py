"""ONNX graphs written node by node from a network's config; nothing is traced.

``write_graph`` gives a model whose weights are external data: byte ranges of files beside it, by reference.
"""

from collections.abc import Mapping

import onnx

from ...schemas.errors import ExportError
from ...schemas.ports import ports_of
from ...schemas.stages import NetworkConfig, Stage, TextEncoderConfig, UNetConfig, VQGANConfig
from ...schemas.tensors import expected_tensors
from .builder import IR_VERSION, OPSET, Graph, Weight
from .decoder import write_decoder
from .prior import write_prior
from .text_encoder import write_text_encoder
from .vqgan import write_vqgan

__all__ = ["IR_VERSION", "OPSET", "Weight", "write_graph"]


def write_graph(config: NetworkConfig, weights: Mapping[str, Weight]) -> onnx.ModelProto:
    """The graph of the network that `config` describes, with the ports of ``schemas.ports``.

    `weights` by their diffusers names; those the graph does not need are ignored. It computes in fp32 whatever they
    are stored in, and loads with onnxruntime 1.19 and later. Save it with ``onnx.save`` into the folder that the
    weights' locations are relative to.

    Raises ExportError, naming all of them, when weights are missing or not what the config says, and for configs
    no graph is written for.
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
        case _:
            raise ExportError(f"{config.stage}: no graph is written for this network")
