"""The graphs of each stage: their writers, and their ports."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import onnx

from ...schemas.control import control_ports, control_ranges
from ...schemas.folded_biases import folded_shapes
from ...schemas.hoisted import CONDITIONING, STEP, conditioning_ports, step_ports
from ...schemas.manifest import ENCODER_GRAPH, MAIN_GRAPH
from ...schemas.ports import StagePorts, ports_of, vqgan_encoder_ports
from ...schemas.stages import CONTROLNETS, NetworkConfig, Stage, UNetConfig
from ...schemas.tensors import expected_tensors
from ...storage.safetensors_reader import TensorRange
from .controlnet import write_controlnet
from .decoder import write_decoder, write_decoder_conditioning, write_decoder_step
from .effnet_encoder import write_effnet_encoder
from .graph import Graph
from .graph_options import GraphOptions
from .image_encoder import write_image_encoder
from .previewer import write_previewer
from .prior import write_prior, write_prior_conditioning, write_prior_step
from .text_encoder import write_text_encoder
from .vqgan import write_vqgan, write_vqgan_encoder

Writer = Callable[[Graph, Any], onnx.ModelProto]

# The graphs of a stage by name. The main graph is the whole network; CONDITIONING and STEP are its two parts. The main
# graph of the vqgan is its decoder.
WRITERS: Mapping[Stage, Mapping[str, Writer]] = {
    Stage.PRIOR: {MAIN_GRAPH: write_prior, CONDITIONING: write_prior_conditioning, STEP: write_prior_step},
    Stage.DECODER: {MAIN_GRAPH: write_decoder, CONDITIONING: write_decoder_conditioning, STEP: write_decoder_step},
    Stage.VQGAN: {MAIN_GRAPH: write_vqgan, ENCODER_GRAPH: write_vqgan_encoder},
    Stage.TEXT_ENCODER: {MAIN_GRAPH: write_text_encoder},
    Stage.IMAGE_ENCODER: {MAIN_GRAPH: write_image_encoder},
    Stage.EFFNET_ENCODER: {MAIN_GRAPH: write_effnet_encoder},
    Stage.PREVIEWER: {MAIN_GRAPH: write_previewer},
    **{kind: {MAIN_GRAPH: write_controlnet} for kind in CONTROLNETS},
}
DEFAULT = GraphOptions()


def write_graph(
    config: NetworkConfig, weights: Mapping[str, TensorRange], options: GraphOptions = DEFAULT, name: str = MAIN_GRAPH
) -> onnx.ModelProto:
    """The graph `name` of the network that `config` describes, with the ports of ``graph_ports``.

    `weights` are byte ranges by diffusers names; weights that the graph does not need are ignored. The graph computes
    in the precision of `options`, and loads with onnxruntime 1.19 and later. Save it with ``onnx.save`` into the
    folder of the weights.

    Raises ExportError naming all weights that are missing or differ from the config, and for configs that no graph can
    be written for."""
    writer = WRITERS[config.stage][name]
    expected = expected_tensors(config) | folded_shapes(config)
    return writer(Graph(graph_ports(config, options, name), expected, weights, options), config)


def write_graphs(
    config: NetworkConfig, weights: Mapping[str, TensorRange], options: GraphOptions = DEFAULT
) -> dict[str, onnx.ModelProto]:
    """Every graph of the network by its name, "model" first. Raises what `write_graph` raises."""
    return {name: write_graph(config, weights, options, name) for name in WRITERS[config.stage]}


def graph_ports(config: NetworkConfig, options: GraphOptions = DEFAULT, name: str = MAIN_GRAPH) -> StagePorts:
    """Inputs and outputs of the graph `name`."""
    network: Any = config  # the other graphs belong to one kind of network each
    if name == CONDITIONING:
        return conditioning_ports(network, options.between)
    if name == ENCODER_GRAPH:
        return vqgan_encoder_ports(network)
    ports = step_ports(network, options.between, options.modulation_rows) if name == STEP else ports_of(config)
    if not isinstance(config, UNetConfig) or not options.control:
        return ports
    control = control_ports(config, options.control)
    return replace(ports, inputs=(*ports.inputs, *control), ranges={**ports.ranges, **control_ranges(control)})
