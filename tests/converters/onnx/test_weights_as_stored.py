"""Graphs for ONNX Runtime read weights as they are stored: the host neither casts nor multiplies a large one.

A node whose inputs are weights alone is folded when a graph is loaded, on the host, whatever the device is."""

from collections.abc import Iterator
from math import prod

import onnx
import pytest
from onnx import TensorProto

from cascadekit.converters.onnx import GraphOptions, write_graph
from cascadekit.converters.onnx.writers import WRITERS
from cascadekit.schemas.manifest import MAIN_GRAPH
from cascadekit.schemas.precision import Precision, Target
from cascadekit.schemas.stages import PRESETS, NetworkConfig, Stage, UNetConfig, Variant
from cascadekit.schemas.unet_blocks import streams_of
from helpers.graphs import places_of

STORED = {Precision.FP32: "F32", Precision.FP16: "F16", Precision.BF16: "BF16"}
TYPES = {Precision.FP32: TensorProto.FLOAT, Precision.FP16: TensorProto.FLOAT16, Precision.BF16: TensorProto.BFLOAT16}
CONFIGS = {str(stage): config for (stage, variant), config in PRESETS.items() if variant is Variant.FULL}
SMALL = 1 << 19  # values: 1 MB in fp16. The mappers of black pixels and of conditions that are always 0 are constants


def exponents_of(config: NetworkConfig, precision: Precision) -> dict[str, int]:
    """Exponents for all streams in fp16, so that every weight that they scale is scaled."""
    if precision is not Precision.FP16:
        return {}
    if isinstance(config, UNetConfig):
        return dict.fromkeys(streams_of(config), 3)
    return {"up_blocks": 3, "down_blocks": 3} if config.stage is Stage.VQGAN else {}


def folded(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, str]]:
    """Yield each node of constants alone, with each initialiser that it reads."""
    weights = {tensor.name for tensor in model.graph.initializer}
    known = set(weights)
    for node in model.graph.node:
        inputs = [name for name in node.input if name]
        if inputs and all(name in known for name in inputs):
            known.update(node.output)
            yield from ((node, name) for name in inputs if name in weights)


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_no_large_weight_goes_through_the_host(config: NetworkConfig, precision: Precision) -> None:
    """Except the transposed convolutions of bf16, which CUDA computes in fp32."""
    options = GraphOptions(precision, Target.ORT, exponents=exponents_of(config, precision))
    for name in [name for name in WRITERS[config.stage] if name != MAIN_GRAPH or not isinstance(config, UNetConfig)]:
        model = write_graph(config, places_of(config, STORED[precision], biases=True), options, name)
        sizes = {tensor.name: prod(tensor.dims) for tensor in model.graph.initializer}
        readers = {each: node.op_type for node in model.graph.node for each in node.input}
        on_host = {
            weight
            for node, weight in folded(model)
            if sizes[weight] > SMALL and readers[node.output[0]] != "ConvTranspose"
        }
        assert on_host == set()
        large = {tensor.data_type for tensor in model.graph.initializer if prod(tensor.dims) > SMALL}
        assert large <= {TYPES[precision]}


def test_what_the_host_would_compute_is_found() -> None:
    """Without the file of biases, each beta is multiplied by its matrix."""
    config = PRESETS[Stage.PRIOR, Variant.FULL]
    model = write_graph(config, places_of(config, "F16"), GraphOptions(Precision.FP16, Target.ORT), "step")
    sizes = {tensor.name: prod(tensor.dims) for tensor in model.graph.initializer}
    found = {weight for _, weight in folded(model) if sizes[weight] > SMALL}
    assert len(found) == 64
    assert 2 * sum(sizes[weight] for weight in found) > 2.1e9
