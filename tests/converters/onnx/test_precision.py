"""Graphs that compute in 16 bits, in onnx's evaluator, against the PyTorch reference in the same type."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, shape_inference
from safetensors.torch import save_file
from torch import nn

from cascadekit.converters.onnx import GraphOptions, graph_ports, write_graphs
from cascadekit.converters.onnx.graph import Graph
from cascadekit.converters.onnx.layers import leaky_relu
from cascadekit.converters.onnx.writers import WRITERS
from cascadekit.parity.reference import load_reference
from cascadekit.schemas.ports import ports_of
from cascadekit.schemas.precision import Precision, Target
from cascadekit.schemas.stages import (
    PRESETS,
    EffnetEncoderConfig,
    ImageEncoderConfig,
    NetworkConfig,
    PreviewerConfig,
    Stage,
    TextEncoderConfig,
    Variant,
)
from cascadekit.schemas.unet_blocks import streams_of
from cascadekit.storage.safetensors_reader import read_header
from helpers.efficientnets import narrow_effnet

RELEASED_EFFNET = EffnetEncoderConfig()
EFFNET, PREVIEWER = narrow_effnet(), PreviewerConfig(c_hidden=16)
VISION = ImageEncoderConfig(32, 64, 2, 2, 24, image_size=28)
PRIOR, DECODER, VQGAN = (PRESETS[stage, Variant.TINY] for stage in (Stage.PRIOR, Stage.DECODER, Stage.VQGAN))
TEXT = TextEncoderConfig(64, 96, 2, 2, 24, vocab_size=50, eos_token_id=49)
SIZES = {
    Stage.PRIOR: {"batch": 2, "height": 5, "width": 7, "tokens": 9, "images": 2},
    Stage.DECODER: {"batch": 2, "height": 34, "width": 22, "effnet_height": 5, "effnet_width": 2},
    Stage.VQGAN: {"batch": 2, "height": 6, "width": 9},
    Stage.EFFNET_ENCODER: {"batch": 1, "height": 65, "width": 33},
    Stage.PREVIEWER: {"batch": 2, "height": 2, "width": 3},
    Stage.IMAGE_ENCODER: {"batch": 2},
}
NETWORKS = [PRIOR, DECODER, VQGAN, TEXT, VISION, EFFNET, PREVIEWER]
HALVES = {Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}
FACTOR = 2.0  # a graph may be this much further from fp32 than PyTorch in the same type; 1.4 is found


def inputs_of(graph: Any) -> dict[str, np.ndarray]:
    if graph.config.stage is not Stage.TEXT_ENCODER:
        values: dict[str, np.ndarray] = graph.inputs(**SIZES[graph.config.stage])
        return values
    ids = np.random.default_rng(0).integers(0, 49, (2, 77))
    ids[:, -5:] = 49
    return {"input_ids": ids, "attention_mask": (np.arange(77)[None] < [[60], [77]]).astype(np.int64)}


def in_half(graph: Any, inputs: dict[str, np.ndarray], dtype: torch.dtype) -> dict[str, np.ndarray]:
    """The reference in `dtype`, its timestep embedding computed in fp32 as in the graphs."""
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in graph.tensors.items()}
    network = load_reference(graph.config, tensors, dtype)
    if "timestep_ratio" in inputs:
        embed, ratio = network.time_embedding, torch.from_numpy(inputs["timestep_ratio"])
        network.time_embedding = lambda _: embed(ratio).to(dtype)
    arguments = {name: torch.from_numpy(value) for name, value in inputs.items()}
    with torch.no_grad():
        outputs = network(**{n: v.to(dtype) if v.is_floating_point() else v for n, v in arguments.items()})
    return {name: value.float().numpy() for name, value in outputs.items()}


# The released effnet encoder takes seconds.
TARGETS = [
    pytest.param(
        config,
        target,
        id=f"{'released ' if config is RELEASED_EFFNET else ''}{config.stage}-{target}",
        marks=pytest.mark.slow if config is RELEASED_EFFNET else (),
    )
    for config in (*NETWORKS, RELEASED_EFFNET)
    for target in Target
]


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize(("config", "target"), TARGETS)
def test_as_close_to_fp32_as_pytorch_in_the_same_type(
    export: Callable[..., Any],
    evaluate: Callable[..., Any],
    difference: Callable[..., float],
    config: NetworkConfig,
    precision: Precision,
    target: Target,
) -> None:
    graph = export(config)
    inputs = inputs_of(graph)
    found = evaluate(graph.write(GraphOptions(precision=precision, target=target)), inputs)
    expected = graph.expected(inputs)
    floor = difference(in_half(graph, inputs, HALVES[precision]), expected)
    assert 0 < difference(found, expected) <= FACTOR * floor


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("target", [Target.PORTABLE, Target.ORT])
@pytest.mark.parametrize("config", [PRIOR, DECODER], ids=lambda c: c.stage)
def test_hoisting_changes_nothing_in_half_precision(
    export: Callable[..., Any],
    evaluate: Callable[..., Any],
    difference: Callable[..., float],
    config: NetworkConfig,
    target: Target,
    precision: Precision,
) -> None:
    """The ports between the graphs are float32, which holds every half exactly, or have the type of the graphs.

    For ONNX Runtime, the step adds biases in another order, and takes one timestep for all samples."""
    graph = export(config)
    inputs, options = inputs_of(graph), GraphOptions(precision=precision, target=target)
    if target is Target.ORT:
        inputs["timestep_ratio"][:] = inputs["timestep_ratio"][0]
    plain = evaluate(graph.write(options), inputs)
    wanted = [port.name for port in graph_ports(config, options, "conditioning").inputs]
    given = {**inputs, "timestep_ratios": inputs["timestep_ratio"]}
    conditions = evaluate(graph.write(options, "conditioning"), {name: given[name] for name in wanted})
    if target is Target.ORT:
        conditions["modulation"] = conditions["modulation"][:1]
    stepped = evaluate(graph.write(options, "step"), {"sample": inputs["sample"], **conditions})
    if target is Target.PORTABLE:
        np.testing.assert_array_equal(stepped["noise_pred"], plain["noise_pred"])
        return
    exact = graph.run(inputs)  # fp32
    assert difference(stepped, exact) <= 1.3 * difference(plain, exact)


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("config", NETWORKS, ids=lambda c: c.stage)
def test_types_are_strict_and_islands_wide(
    export: Callable[..., Any], config: NetworkConfig, precision: Precision
) -> None:
    graph = export(config)
    for name, model in write_graphs(config, graph.weights, GraphOptions(precision=precision)).items():
        path = graph.path.with_name(f"strict_{name}.onnx")
        onnx.save(model, path)
        onnx.checker.check_model(path, full_check=True)
        inferred = shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
        types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.graph.value_info, *inferred.graph.input)}
        wide = {"Softmax", "ReduceSum", "ReduceMean", "Resize", "Sin", "Cos"}
        wide |= {"ConvTranspose"} if precision is Precision.BF16 else set()
        halves = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
        moving = {port.name for port in model.graph.input}  # values that are no constants, which fold in fp32
        for node in model.graph.node:
            if node.op_type in wide:
                assert types[node.input[0]] == TensorProto.FLOAT, node.name
            if not moving.isdisjoint(node.input):
                moving.update(node.output)
                if node.op_type in {"Conv", "Gemm", "MatMul", "Gelu"} and "/" not in node.name:
                    assert types[node.output[0]] in halves, node.name


def with_stream_beyond_fp16(graph: Any, folder: Path, factor: float, parts: tuple[str, ...]) -> Any:
    """The tiny prior with the weights `parts` of its last blocks made `factor` times larger."""
    tensors = {
        name: t * factor if name.startswith("up_blocks.1") and any(part in name for part in parts) else t
        for name, t in graph.tensors.items()
    }
    file = folder / "weights.safetensors"
    save_file(tensors, file)
    return replace(graph, path=folder / "model.onnx", tensors=tensors, weights=read_header(file).tensors)


def test_a_stream_beyond_fp16_is_kept_small_enough(
    export: Callable[..., Any], evaluate: Callable[..., Any], difference: Callable[..., float], tmp_path: Path
) -> None:
    graph = with_stream_beyond_fp16(export(PRIOR), tmp_path, 3e4, (".channelwise.4.", ".to_out.0."))
    inputs = inputs_of(graph)
    expected = graph.expected(inputs)
    naive = evaluate(graph.write(GraphOptions(precision=Precision.FP16)), inputs)["noise_pred"]
    assert np.isnan(naive).all()
    for exponent in (3, 5, 8):
        options = GraphOptions(precision=Precision.FP16, exponents={"up_blocks.1": exponent})
        assert difference(evaluate(graph.write(options), inputs), expected) <= 2e-3  # as without such weights
    too_small = GraphOptions(precision=Precision.FP16, exponents={"up_blocks.1": 1})
    assert np.isnan(evaluate(graph.write(too_small), inputs)["noise_pred"]).all()


def test_a_perceptron_beyond_fp16_is_computed_in_fp32(
    export: Callable[..., Any], evaluate: Callable[..., Any], difference: Callable[..., float], tmp_path: Path
) -> None:
    graph = with_stream_beyond_fp16(export(PRIOR), tmp_path, 5e4, ("1.0.channelwise.0.",))
    inputs = inputs_of(graph)
    options = GraphOptions(precision=Precision.FP16, exponents={"up_blocks.1": 4})
    assert np.isnan(evaluate(graph.write(options), inputs)["noise_pred"]).any()
    found = evaluate(graph.write(replace(options, fp32_blocks=frozenset({"up_blocks.1.0"}))), inputs)
    assert difference(found, graph.expected(inputs)) <= 2e-3


@pytest.mark.parametrize("target", [Target.PORTABLE, Target.ORT])
@pytest.mark.parametrize("config", [PRIOR, DECODER], ids=lambda c: c.stage)
def test_exponents_are_exact(
    export: Callable[..., Any], evaluate: Callable[..., Any], config: NetworkConfig, target: Target
) -> None:
    """A power of two goes through every sum unrounded, so in fp32 and bf16 not a bit of the result changes."""
    graph = export(config)
    inputs = inputs_of(graph)
    exponents = {stream: number + 1 for number, stream in enumerate(streams_of(config))}
    for precision in (Precision.FP32, Precision.BF16):
        options = GraphOptions(precision=precision, target=target)
        plain = evaluate(graph.write(options), inputs)["noise_pred"]
        scaled = evaluate(graph.write(replace(options, exponents=exponents)), inputs)["noise_pred"]
        np.testing.assert_allclose(scaled, plain, rtol=0, atol=1e-6 * np.abs(plain).max())


def test_probes_are_the_largest_magnitudes(export: Callable[..., Any]) -> None:
    from helpers.graphs import open_session, run

    graph = export(PRIOR)
    inputs = inputs_of(graph)
    found = run(open_session(graph.write(GraphOptions(probes=True))), inputs)
    seen: dict[str, float] = {}
    for name, module in graph.reference.named_modules():

        def hook(module: nn.Module, arguments: Any, output: Any, name: str = name) -> None:
            if isinstance(output, torch.Tensor):
                seen[name] = float(output.abs().max())

        module.register_forward_hook(hook)
    graph.expected(inputs)
    probed = {name.removesuffix("/max"): float(value) for name, value in found.items() if name.endswith("/max")}
    assert len(probed) == 4 * 8  # four blocks of each kind: a stream each, four values in a perceptron, scores
    for name, value in probed.items():
        module = name.removesuffix("/rows")
        if module in seen:
            assert value == pytest.approx(seen[module], rel=1e-4), name
    assert sum(name.removesuffix("/rows") in seen for name in probed) == 4 * 6


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
@pytest.mark.parametrize("config", NETWORKS, ids=lambda c: c.stage)
def test_every_graph_runs_in_onnxruntime(
    export: Callable[..., Any], difference: Callable[..., float], config: NetworkConfig, precision: Precision
) -> None:
    """ONNX Runtime checks the types of its own operators when it loads a graph; onnx does not know them."""
    from helpers.graphs import open_session, run

    graph = export(config)
    options = GraphOptions(precision=precision, target=Target.ORT)
    inputs = inputs_of(graph)
    found = run(open_session(graph.write(options)), inputs)
    assert difference(found, graph.expected(inputs)) <= (2e-3 if precision is Precision.FP16 else 1e-5)
    for name in WRITERS[config.stage]:
        open_session(graph.write(options, name))


def test_leaky_relu_of_bf16(evaluate: Callable[..., Any], tmp_path: Path) -> None:
    """Its only users, the ControlNets, are too large for the evaluator."""
    graph = Graph(ports_of(PREVIEWER), {}, {}, GraphOptions(precision=Precision.BF16))
    leaky_relu(graph, "images", "latents", 0.2)
    onnx.save(graph.model("leaky", "leaky"), tmp_path / "leaky.onnx")
    given = np.random.default_rng(0).standard_normal((2, 16, 3, 3)).astype(np.float32)
    expected = torch.nn.functional.leaky_relu(torch.from_numpy(given).bfloat16(), 0.2).float().numpy()
    found = evaluate(tmp_path / "leaky.onnx", {"latents": given})["images"]
    np.testing.assert_allclose(found, expected, rtol=2**-7)  # 0.2 is rounded to bf16 before the product
