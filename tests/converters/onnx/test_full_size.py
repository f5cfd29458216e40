"""Networks of the released sizes: every shape of every graph, and one block of each kind at its real width."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, shape_inference

from cascadekit.converters.onnx import GraphOptions, graph_ports, write_graphs
from cascadekit.schemas.precision import Precision
from cascadekit.schemas.stages import PRESETS, RES_TIMESTEP_ATTENTION, NetworkConfig, Stage, Variant, prior_config
from cascadekit.schemas.tensors import expected_tensors, is_counter
from cascadekit.storage.safetensors_reader import TensorRange
from helpers.graphs import open_session, run

RELEASED = {f"{stage} {variant}": config for (stage, variant), config in PRESETS.items() if variant is not Variant.TINY}
SIZES = {
    "batch": 2,
    "height": 64,
    "width": 96,
    "tokens": 77,
    "images": 1,
    "steps": 20,
    "effnet_height": 24,
    "effnet_width": 36,
    "height/2": 32,
    "width/2": 48,
}


def anywhere(config: NetworkConfig) -> dict[str, TensorRange]:
    """Entries of a bf16 file that is not there."""
    offset, weights = 3, {}
    for name, shape in expected_tensors(config).items():
        length = math.prod(shape) * 2
        dtype = "I64" if is_counter(name) else "BF16"
        weights[name] = TensorRange(Path("stage.safetensors"), dtype, shape, offset, length)
        offset += length
    return weights


# Every network in one precision, and every precision with a third of the networks; the marker `slow` has the others.
IN_PRECISIONS = [
    pytest.param(
        name,
        precision,
        id=f"{name}-{precision}",
        marks=() if (number - place) % len(Precision) == 0 else pytest.mark.slow,
    )
    for number, name in enumerate(RELEASED)
    for place, precision in enumerate(Precision)
]


@pytest.mark.parametrize(("name", "precision"), IN_PRECISIONS)
def test_shapes_are_inferred_to_the_end(name: str, precision: Precision) -> None:
    config = RELEASED[name]
    options = GraphOptions(precision=precision)
    for which, model in write_graphs(config, anywhere(config), options).items():
        assert len(model.SerializeToString()) < 3_000_000
        ports = graph_ports(config, options, which)
        sizes = {**SIZES, "context": 4 if config.stage is Stage.DECODER else 77 + 4 + 4}
        for value, port in zip(model.graph.input, ports.inputs, strict=True):
            dims = [sizes[dim] if isinstance(dim, str) else dim for dim in port.dims]
            value.CopyFrom(helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, dims))
        for value in model.graph.output:
            value.type.tensor_type.ClearField("shape")
        inferred = shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
        for value, port in zip(inferred.graph.output, ports.outputs, strict=True):
            found = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
            assert found == tuple(_size(dim, sizes) if isinstance(dim, str) else dim for dim in port.dims), port.name
            assert value.type.tensor_type.elem_type == TensorProto.FLOAT


def _size(dim: str, sizes: dict[str, int]) -> int:
    """A dim such as "8*height" or "(height+31)//32"."""
    value: int = sizes.get(dim) or eval(dim, {"__builtins__": {}}, sizes)
    return value


def test_a_block_of_each_kind_at_full_width(export: Callable[..., Any], difference: Callable[..., float]) -> None:
    """2048 channels and 32 heads, down and up once, stored in bf16; the reference computes with the same weights."""
    config = replace(
        prior_config((2048,), (32,), (1,)),
        block_types_per_layer=(RES_TIMESTEP_ATTENTION,),
        down_blocks_repeat_mappers=(1,),
        up_blocks_repeat_mappers=(1,),
        dropout=(0.1,),
        switch_level=(),
    )
    assert config.stage is Stage.PRIOR
    graph = export(config, dtype=lambda name: torch.bfloat16)
    inputs = graph.inputs(batch=2, height=5, width=6, tokens=77, images=1)
    assert difference(graph.run(inputs), graph.expected(inputs)) <= 1e-5
    options = GraphOptions()
    wanted = [port.name for port in graph_ports(config, options, "conditioning").inputs]
    given = {**inputs, "timestep_ratios": inputs["timestep_ratio"]}
    conditions = run(open_session(graph.write(options, "conditioning")), {name: given[name] for name in wanted})
    stepped = run(open_session(graph.write(options, "step")), {"sample": inputs["sample"], **conditions})
    np.testing.assert_allclose(stepped["noise_pred"], graph.run(inputs)["noise_pred"], rtol=1e-5, atol=1e-5)
