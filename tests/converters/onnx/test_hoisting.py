"""Conditioning and step graphs together are the plain graph."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest

from cascadekit.converters.onnx import GraphOptions, graph_ports, write_graph
from cascadekit.schemas.hoisted import MODULATION, RATIOS, modulation_width
from cascadekit.schemas.precision import Target
from cascadekit.schemas.stages import UNetConfig
from cascadekit.storage.safetensors_reader import TensorRange
from helpers.graphs import open_session, run
from helpers.unets import DECODER, DECODER_SIZES, ODD_DECODER, ODD_PRIOR, ODD_PRIOR_SIZES, PRIOR, PRIOR_SIZES, inputs_of

CASES = [
    (PRIOR, PRIOR_SIZES[1]),
    (PRIOR, PRIOR_SIZES[3]),
    (ODD_PRIOR, ODD_PRIOR_SIZES[1]),
    (DECODER, DECODER_SIZES[1]),
    (DECODER, DECODER_SIZES[3]),
    (ODD_DECODER, DECODER_SIZES[2]),
]


def hoisted(graph: Any, inputs: dict[str, np.ndarray], options: GraphOptions) -> np.ndarray:
    """noise_pred through both graphs; the schedule has other ratios before and after those that are wanted."""
    conditioning = open_session(graph.write(options, "conditioning"))
    wanted = [port.name for port in graph_ports(graph.config, options, "conditioning").inputs]
    ratios = inputs["timestep_ratio"]
    schedule = np.concatenate([np.float32([1, 0.5]), ratios, np.float32([0])])
    given = {**inputs, RATIOS: schedule}
    conditions = run(conditioning, {name: given[name] for name in wanted})
    assert conditions[MODULATION].shape == (len(schedule), modulation_width(graph.config))
    step = open_session(graph.write(options, "step"))
    (rows,) = [port.dims[0] for port in graph_ports(graph.config, options, "step").inputs if port.name == MODULATION]
    modulation = conditions.pop(MODULATION)[2 : 2 + len(ratios)]
    given = {"sample": inputs["sample"], **conditions}
    if rows == "batch":
        return np.asarray(run(step, {**given, MODULATION: modulation})["noise_pred"])
    # One row for all samples: each sample has its own ratio, and goes alone.
    alone = [
        {name: value[i : i + 1] for name, value in {**given, MODULATION: modulation}.items()}
        for i in range(len(ratios))
    ]
    return np.concatenate([run(step, each)["noise_pred"] for each in alone])


@pytest.mark.parametrize(("config", "sizes"), CASES, ids=lambda v: v.stage if isinstance(v, UNetConfig) else str(v))
@pytest.mark.parametrize("target", Target)
def test_equal_to_the_plain_graph_and_to_the_reference(
    export: Callable[..., Any], config: UNetConfig, sizes: tuple[int, ...], target: Target
) -> None:
    graph = export(config)
    inputs = inputs_of(graph, sizes)
    found = hoisted(graph, inputs, GraphOptions(target=target))
    for other, tolerance in ((graph.run(inputs)["noise_pred"], 1e-6), (graph.expected(inputs)["noise_pred"], 1e-5)):
        assert np.linalg.norm(found - other) <= tolerance * np.linalg.norm(other)


@pytest.mark.parametrize("config", [PRIOR, DECODER], ids=lambda c: c.stage)
def test_the_step_graph_has_no_weights_of_the_conditioning(export: Callable[..., Any], config: UNetConfig) -> None:
    graph = export(config)
    names = {
        name: {t.name for t in onnx.load(graph.write(GraphOptions(), name), load_external_data=False).graph.initializer}
        for name in ("model", "conditioning", "step")
    }
    stored = {name: found & set(graph.weights) for name, found in names.items()}
    mapped = ("kv_mapper", "mapper", "clip_", "effnet_mapper", "pixels_mapper")
    assert not [name for name in stored["step"] if any(part in name for part in mapped) and "repeat" not in name]
    assert stored["step"] | stored["conditioning"] == stored["model"]
    shared = stored["step"] & stored["conditioning"]
    assert all(".to_k." in name or ".to_v." in name for name in shared)  # both kinds of token go through them


def joined(graph: Any) -> dict[str, TensorRange]:
    """Where the weights would lie if q, k and v of each attention followed one another, as in the original layout."""
    order = sorted(graph.weights, key=lambda name: (name.rsplit(".", 1)[1], name.replace("to_out", "zz")))
    offset, found = 16, {}
    parts = {"to_q": 0, "to_k": 1, "to_v": 2}
    order.sort(key=lambda name: next((n for part, n in parts.items() if part in name), 3))
    blocks = sorted(order, key=lambda n: (n.split(".to_")[0], n.endswith("bias"), [p in n for p in parts][::-1]))
    for name in blocks:
        weight = graph.weights[name]
        found[name] = replace(weight, path=weight.path.with_name("joined.bin"), offset=offset)
        offset += weight.nbytes
    data = bytearray(offset)
    source = graph.path.with_name("weights.safetensors").read_bytes()
    for name, weight in found.items():
        old = graph.weights[name]
        data[weight.offset : weight.offset + weight.nbytes] = source[old.offset : old.offset + old.nbytes]
    graph.path.with_name("joined.bin").write_bytes(data)
    return found


@pytest.mark.parametrize("name", ["model", "step"])
def test_projections_that_lie_side_by_side_are_one_product(
    export: Callable[..., Any], difference: Callable[..., float], name: str
) -> None:
    graph = export(PRIOR)
    inputs = inputs_of(graph, PRIOR_SIZES[1])
    packed = replace(graph, weights=joined(graph))
    model = write_graph(PRIOR, packed.weights, GraphOptions(), name)
    products = [node.name for node in model.graph.node if node.op_type == "Gemm" and ".attention.to_" in node.name]
    parts = {"model": ("to_q", "to_k+to_v"), "step": ("to_q+to_k+to_v",)}[name]
    blocks = {product.split(".attention.")[0] for product in products}
    assert len(blocks) == 10
    assert sorted(products) == sorted(f"{b}.attention.{part}" for b in blocks for part in (*parts, "to_out.0"))
    if name == "model":
        path = packed.write(GraphOptions())
        onnx.checker.check_model(path, full_check=True)
        assert difference(run(open_session(path), inputs), graph.expected(inputs)) <= 1e-5
    else:
        found = hoisted(packed, inputs, GraphOptions())
        assert difference({"noise_pred": found}, graph.expected(inputs)) <= 1e-5
