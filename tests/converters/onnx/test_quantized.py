"""Graphs with quantised weights: what they compute, what they are made of, and who takes them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from safetensors.torch import load_file

from cascadekit.converters.export.quantize_file import quantize_weights
from cascadekit.converters.onnx import GraphOptions, graph_ports, write_graph, write_graphs
from cascadekit.parity.reference import load_reference
from cascadekit.runtime.engines.int8_saturation import int8_saturates
from cascadekit.schemas.errors import ExportError, UsageError
from cascadekit.schemas.precision import Precision, Target
from cascadekit.schemas.quantization import TARGETS, Quantization, candidates
from cascadekit.schemas.stages import PRESETS, NetworkConfig, Stage, TextEncoderConfig, Variant, prior_config
from cascadekit.schemas.tensors import expected_tensors
from cascadekit.schemas.unet_blocks import streams_of
from cascadekit.storage.safetensors_reader import TensorRange, read_header
from helpers.graphs import Exported, open_session, run

TOLERANCE = 1e-5  # relative L2 of fp32 against fp32 with the dequantised weights; about 1e-6 is found
PRIOR, DECODER = (PRESETS[stage, Variant.TINY] for stage in (Stage.PRIOR, Stage.DECODER))
TEXT = TextEncoderConfig(64, 96, 2, 2, 24, vocab_size=50, eos_token_id=49)
NETWORKS = [PRIOR, DECODER, TEXT]
SIZES = {
    Stage.PRIOR: {"batch": 2, "height": 5, "width": 7, "tokens": 9, "images": 2},
    Stage.DECODER: {"batch": 2, "height": 34, "width": 22, "effnet_height": 5, "effnet_width": 2},
}
INT8, INT4, DYNAMIC, FP8 = Quantization.INT8, Quantization.INT4, Quantization.INT8_DYNAMIC, Quantization.FP8
PORTABLE, ORT, TENSORRT = Target
WEIGHT_ONLY = [GraphOptions(quantization=kind, target=target) for kind in (INT8, INT4, FP8) for target in TARGETS[kind]]
WEIGHT_ONLY += [GraphOptions(quantization=INT4, target=ORT, block_size=128)]  # rows of half a block and of two

# Relative L2 that rounding adds to one matrix of normal numbers, by step / sqrt(12) with the expected largest of a
# block of 32 (2.38) or of a row of 64 (2.65), and for fp8 by a mantissa of 3 bits, see tests of quantize.
ROUNDING = {INT8: 2.38 / 127 / 12**0.5, INT4: 2.38 / 7 / 12**0.5, FP8: 0.027, DYNAMIC: 2.65 / 127 / 12**0.5}


@dataclass(frozen=True)
class Quantised:
    """A network's graph, its modules quantised as `options` say, beside the files of its weights."""

    graph: Exported
    options: GraphOptions
    weights: Mapping[str, TensorRange]
    stored: Mapping[str, Any]  # the quantised tensors, as torch loads them

    def write(self, options: GraphOptions, name: str = "model") -> Path:
        path = self.graph.path.with_name(f"quantised_{name}.onnx")
        onnx.save(write_graph(self.graph.config, self.weights, options, name), path)
        onnx.checker.check_model(path, full_check=True)
        return path

    def run(self, inputs: Mapping[str, np.ndarray], options: GraphOptions | None = None) -> dict[str, np.ndarray]:
        return run(open_session(self.write(options or self.options)), inputs)

    def expected(self, inputs: Mapping[str, np.ndarray], **changes: Any) -> dict[str, np.ndarray]:
        """PyTorch in fp32, with the weights read back from the file."""
        tensors = dict(self.graph.tensors)
        for module in self.options.quantized:
            shape = tensors[f"{module}.weight"].shape
            tensors[f"{module}.weight"] = self.read(module, tuple(shape[:2])).reshape(shape)
        network = load_reference(self.graph.config, tensors)
        with torch.no_grad():
            outputs = network(**{name: torch.from_numpy(value) for name, value in inputs.items()})
        return {name: value.numpy() for name, value in outputs.items()}

    def read(self, module: str, shape: tuple[int, int]) -> torch.Tensor:
        """The float weight that the stored tensors stand for, written out by their specifications."""
        values, scale = self.stored[f"{module}.weight_quantized"], self.stored[f"{module}.weight_scale"]
        kind = self.options.quantization
        if kind is INT4:
            values = torch.stack([values & 15, values >> 4], -1).flatten(-2).to(torch.int16)
        middle = 0
        if self.options.target is ORT and kind in (INT8, INT4):
            values, middle = values.flatten(1), 8 if kind is INT4 else 128
        elif kind is INT4:
            values = torch.where(values > 7, values - 16, values)
        elif kind is DYNAMIC:
            values = values.T
        floats = values.float() - middle
        if scale.dim() == 2:
            floats = floats.unflatten(1, (-1, self.options.block_size)) * scale[..., None]
            return floats.flatten(1)[:, : shape[1]]
        return floats * scale[:, None]


@pytest.fixture(scope="session")
def quantise(export: Callable[..., Exported]) -> Callable[[NetworkConfig, GraphOptions], Quantised]:
    """A function for a network with all candidates that fit quantised."""

    def quantised(config: NetworkConfig, options: GraphOptions, modules: frozenset[str] | None = None) -> Quantised:
        graph = export(config)
        shapes = candidates(config.stage, expected_tensors(config))
        fitting = frozenset(m for m, (_, columns) in shapes.items() if options.scheme.fits(columns))
        modules = fitting if modules is None else modules
        path = graph.path.with_name(f"{options.quantization}_{options.target}_{options.block_size}.safetensors")
        tensors = read_header(graph.path.with_name("weights.safetensors")).tensors
        written = quantize_weights(tensors, modules, options.scheme, path)
        floats = {name: w for name, w in graph.weights.items() if name.removesuffix(".weight") not in modules}
        return Quantised(graph, replace(options, quantized=modules), {**floats, **written}, load_file(path))

    return quantised


def inputs_of(graph: Any) -> dict[str, np.ndarray]:
    if graph.config.stage is not Stage.TEXT_ENCODER:
        values: dict[str, np.ndarray] = graph.inputs(**SIZES[graph.config.stage])
        return values
    ids = np.random.default_rng(0).integers(0, 49, (2, 77))
    ids[:, -5:] = 49
    return {"input_ids": ids, "attention_mask": (np.arange(77)[None] < [[60], [77]]).astype(np.int64)}


def name_of(value: Any) -> str:
    if isinstance(value, GraphOptions):
        return f"{value.quantization}-{value.target}-{value.block_size}"
    return str(value.stage) if hasattr(value, "stage") else str(value)


@pytest.mark.parametrize("options", WEIGHT_ONLY, ids=name_of)
@pytest.mark.parametrize("config", NETWORKS, ids=name_of)
def test_weight_only_is_the_network_of_the_dequantised_weights(
    quantise: Callable[..., Quantised], difference: Callable[..., float], config: NetworkConfig, options: GraphOptions
) -> None:
    made = quantise(config, options)
    inputs = inputs_of(made.graph)
    found = made.run(inputs)
    assert difference(found, made.expected(inputs)) <= TOLERANCE


@pytest.mark.parametrize("options", [*WEIGHT_ONLY, GraphOptions(quantization=DYNAMIC)], ids=name_of)
@pytest.mark.parametrize("config", NETWORKS, ids=name_of)
def test_rounding_costs_what_it_should(
    quantise: Callable[..., Quantised], difference: Callable[..., float], config: NetworkConfig, options: GraphOptions
) -> None:
    """Errors of n products, independent and none larger in the output than where it arose, add to √n of one's.
    Activations that are rounded too add theirs: their 8-bit step is a 255th of a range of 9 to 12 deviations."""
    made = quantise(config, options)
    inputs = inputs_of(made.graph)
    error = difference(made.run(inputs), made.graph.expected(inputs))
    one = np.hypot(ROUNDING[options.quantization], 12 / 255 / 12**0.5 if options.quantization is DYNAMIC else 0)
    assert one / 4 <= error <= len(made.options.quantized) ** 0.5 * one


def rounded_activations(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """DynamicQuantizeLinear and back, as ONNX spells it out."""
    (x,) = arguments
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / 255
    zero_point = torch.clamp(torch.round(-low / scale), 0, 255)
    return ((torch.clamp(torch.round(x / scale) + zero_point, 0, 255) - zero_point) * scale,)


@pytest.mark.skipif(int8_saturates(), reason="no VNNI: ONNX Runtime's 8-bit products saturate on this CPU")
@pytest.mark.parametrize("target", [PORTABLE, ORT])
@pytest.mark.parametrize(
    ("config", "modules"),
    [
        (PRIOR, ("down_blocks.0.2.attention.to_k", "down_blocks.0.2.attention.to_v")),
        (PRIOR, ("up_blocks.1.2.kv_mapper.1",)),
        (DECODER, ("up_blocks.0.0.channelwise.0",)),  # three passes
        (TEXT, tuple(f"text_model.encoder.layers.1.self_attn.{part}_proj" for part in "qkv")),
        (TEXT, ("text_model.encoder.layers.1.mlp.fc2",)),
    ],
    ids=name_of,
)
def test_dynamic_activations_are_rounded_as_onnx_says(
    quantise: Callable[..., Quantised],
    difference: Callable[..., float],
    config: NetworkConfig,
    modules: tuple[str, ...],
    target: Target,
) -> None:
    """In modules that follow one another, a value close to half a step may fall either way, and then
    moves many in the next. The tolerance is a hundredth of what rounding changes."""
    made = quantise(config, GraphOptions(quantization=DYNAMIC, target=target), frozenset(modules))
    tensors = dict(made.graph.tensors)
    for module in modules:
        tensors[f"{module}.weight"] = made.read(module, tensors[f"{module}.weight"].shape)
    network = load_reference(config, tensors)
    for module in modules:
        network.get_submodule(module).register_forward_pre_hook(rounded_activations)
    inputs = inputs_of(made.graph)
    with torch.no_grad():
        outputs = network(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    expected = {name: value.numpy() for name, value in outputs.items()}
    found = made.run(inputs)
    assert difference(found, expected) <= difference(found, made.expected(inputs)) / 100


@pytest.mark.parametrize("kind", [INT8, INT4])
def test_int8_products_of_onnxruntime(
    quantise: Callable[..., Quantised], difference: Callable[..., float], kind: Quantization
) -> None:
    """Activations in blocks of 32, a step of their largest magnitude / 127."""
    made = quantise(PRIOR, GraphOptions(quantization=kind, target=ORT, int8_products=True))
    inputs = inputs_of(made.graph)
    error = difference(made.run(inputs), made.expected(inputs))
    one = 2.38 / 127 / 12**0.5
    assert one / 4 <= error <= len(made.options.quantized) ** 0.5 * one


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
@pytest.mark.parametrize("target", [PORTABLE, TENSORRT])
@pytest.mark.parametrize("kind", [INT8, INT4, FP8])
def test_in_half_precision(
    quantise: Callable[..., Quantised],
    evaluate: Callable[..., Any],
    difference: Callable[..., float],
    kind: Quantization,
    target: Target,
    precision: Precision,
) -> None:
    made = quantise(PRIOR, GraphOptions(quantization=kind, target=target))
    inputs, options = inputs_of(made.graph), replace(made.options, precision=precision)
    found = evaluate(made.write(options), inputs)
    plain = evaluate(made.graph.write(GraphOptions(precision=precision, target=target)), inputs)
    floor = difference(plain, made.graph.expected(inputs))  # what half precision costs without quantisation
    assert difference(found, made.expected(inputs)) <= 2 * floor


@pytest.mark.parametrize("kind", [INT8, INT4, DYNAMIC])
def test_in_half_precision_on_onnxruntime(
    quantise: Callable[..., Quantised], difference: Callable[..., float], kind: Quantization
) -> None:
    made = quantise(PRIOR, GraphOptions(quantization=kind, target=ORT if kind is not DYNAMIC else PORTABLE))
    inputs = inputs_of(made.graph)
    found = made.run(inputs, replace(made.options, precision=Precision.FP16))
    assert difference(found, made.run(inputs)) <= 2e-3 if kind is not DYNAMIC else 2e-2


@pytest.mark.parametrize(
    ("kind", "target"), [(kind, target) for kind in (INT8, INT4, DYNAMIC, FP8) for target in TARGETS[kind]]
)
def test_exponents_are_exact(quantise: Callable[..., Quantised], kind: Quantization, target: Target) -> None:
    """They go into the scales of the output projection, of which they are powers of two."""
    made = quantise(PRIOR, GraphOptions(quantization=kind, target=target))
    inputs = inputs_of(made.graph)
    exponents = {stream: number + 1 for number, stream in enumerate(streams_of(PRIOR))}
    plain = made.run(inputs)["noise_pred"]
    scaled = made.run(inputs, replace(made.options, exponents=exponents))["noise_pred"]
    flips = 1e-2 if kind is DYNAMIC else 1e-6  # an activation may be rounded the other way
    np.testing.assert_allclose(scaled, plain, rtol=0, atol=flips * np.abs(plain).max())


@pytest.mark.parametrize("config", [PRIOR, DECODER], ids=name_of)
@pytest.mark.parametrize("kind", [INT8, INT4])
def test_hoisting_changes_nothing(
    quantise: Callable[..., Quantised], difference: Callable[..., float], config: NetworkConfig, kind: Quantization
) -> None:
    made = quantise(config, GraphOptions(quantization=kind, target=ORT))
    inputs = inputs_of(made.graph)
    inputs["timestep_ratio"][:] = inputs["timestep_ratio"][0]  # a step for ONNX Runtime takes one for all samples
    wanted = [port.name for port in graph_ports(config, made.options, "conditioning").inputs]
    given = {**inputs, "timestep_ratios": inputs["timestep_ratio"]}
    path = made.write(made.options, "conditioning")
    conditions = run(open_session(path), {name: given[name] for name in wanted})
    conditions["modulation"] = conditions["modulation"][:1]
    stepped = run(open_session(made.write(made.options, "step")), {"sample": inputs["sample"], **conditions})
    assert difference(stepped, made.run(inputs)) <= TOLERANCE


@pytest.mark.parametrize("part", ["to_q", "to_k", "to_out.0"])
def test_some_modules_alone(quantise: Callable[..., Quantised], difference: Callable[..., float], part: str) -> None:
    options = GraphOptions(quantization=INT4, target=ORT)
    made = quantise(PRIOR, options, frozenset({f"down_blocks.0.2.attention.{part}", "up_blocks.1.0.channelwise.4"}))
    inputs = inputs_of(made.graph)
    found = made.run(inputs)
    assert difference(found, made.expected(inputs)) <= TOLERANCE
    assert difference(found, made.graph.expected(inputs)) > 100 * TOLERANCE
    model = onnx.load(made.write(made.options), load_external_data=False)
    assert [node.op_type for node in model.graph.node].count("MatMulNBits") == 2


def test_onnxruntime_joins_what_dynamic_quantisation_needs(quantise: Callable[..., Quantised], tmp_path: Path) -> None:
    import onnxruntime

    made = quantise(PRIOR, GraphOptions(quantization=DYNAMIC, target=ORT))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimised.onnx"), 3
    onnxruntime.InferenceSession(made.write(made.options), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node
    kinds = [node.op_type for node in nodes]
    joined = kinds.count("DynamicQuantizeMatMul") + kinds.count("MatMulIntegerToFloat")
    assert (joined, kinds.count("MatMulInteger")) == (len(made.options.quantized), 0)


@pytest.mark.parametrize("options", WEIGHT_ONLY, ids=name_of)
def test_opset_and_types(quantise: Callable[..., Quantised], options: GraphOptions) -> None:
    made = quantise(PRIOR, options)
    for model in write_graphs(PRIOR, made.weights, made.options).values():
        (opset,) = (entry.version for entry in model.opset_import if not entry.domain)
        blocked = options.quantization in (INT8, INT4) and options.target is PORTABLE
        assert opset == {PORTABLE: 21 if blocked else 20, ORT: 20, TENSORRT: 23}[options.target]
        kinds = {i.name: i.data_type for i in model.graph.initializer if i.name.endswith("weight_quantized")}
        expected = {INT8: TensorProto.INT8, INT4: TensorProto.INT4, FP8: TensorProto.FLOAT8E4M3FN}
        wanted = TensorProto.UINT8 if options.target is ORT else expected[options.quantization]
        assert set(kinds.values()) == {wanted}
        names = {node.name for node in model.graph.node}
        assert {name.removesuffix(".weight_quantized") for name in kinds} <= names


def test_what_cannot_be_is_refused(quantise: Callable[..., Quantised]) -> None:
    made = quantise(PRIOR, GraphOptions(quantization=INT4, target=ORT))

    def refused(
        error: type[Exception], match: str, weights: Mapping[str, TensorRange] = made.weights, **changes: Any
    ) -> None:
        with pytest.raises(error, match=match):
            write_graph(PRIOR, weights, replace(made.options, **changes))

    module = "up_blocks.0.0.channelwise.0"
    refused(UsageError, "int8-dynamic: target tensorrt cannot run it", quantization=DYNAMIC, target=TENSORRT)
    refused(UsageError, "fp8: target ort cannot run it", quantization=FP8)
    refused(UsageError, "block_size=48: expected one of 32, 64, 128", block_size=48)
    refused(UsageError, 'int8_products=True needs kind="int8"', target=PORTABLE, int8_products=True)
    missing = {name: w for name, w in made.weights.items() if name != f"{module}.weight_scale"}
    refused(ExportError, rf"{module}\.weight_scale: missing, expected F32 \[256, 2\] of 2048 bytes", missing)

    other_kind = rf"{module}\.weight_quantized: U8 \[256, 2, 16\] of 8192 bytes, expected U8 \[256, 2, 32\]"
    refused(ExportError, other_kind, quantization=INT8)


@pytest.fixture(scope="session")
def build() -> Callable[[Path, Mapping[str, tuple[int, ...]]], int]:
    """A function that builds a graph's engine for SM89 with TensorRT-RTX, no GPU needed: the engine's size."""
    trt = pytest.importorskip("tensorrt_rtx")

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR and "cuda" not in message.lower():
                self.errors.append(message[:300])

    logger = Logger()  # TensorRT knows one for the process

    def built(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> int:
        logger.errors.clear()
        builder = trt.Builder(logger)
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, logger)
        assert parser.parse_from_file(str(path)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM89, 0)
        profile = builder.create_optimization_profile()
        for name, shape in shapes.items():
            profile.set_shape(name, shape, shape, shape)
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        assert plan is not None, logger.errors
        return int(plan.nbytes)

    return built


# Each kind and each precision once; the marker `slow` has the other pairs.
BUILT = [
    pytest.param(kind, precision, marks=() if number == place else pytest.mark.slow)
    for number, kind in enumerate((INT8, INT4, FP8))
    for place, precision in enumerate((Precision.FP16, Precision.BF16, Precision.FP32))
]


@pytest.mark.parametrize(("kind", "precision"), BUILT)
def test_tensorrt_builds_engines(
    quantise: Callable[..., Quantised], build: Callable[..., int], kind: Quantization, precision: Precision
) -> None:
    made = quantise(PRIOR, GraphOptions(quantization=kind, target=TENSORRT, precision=precision))
    build(made.write(made.options), {name: value.shape for name, value in inputs_of(made.graph).items()})


def test_tensorrt_keeps_the_weights_small(quantise: Callable[..., Quantised], build: Callable[..., int]) -> None:
    """The network is wide enough for weights to count beside kernels: 16 bits, 8, 8, and 4 a weight."""
    wide = prior_config((256, 256), (1, 1), (1, 1), text=8, pooled=12)
    sizes = []
    for kind in (INT8, FP8, INT4):
        made = quantise(wide, GraphOptions(quantization=kind, target=TENSORRT, precision=Precision.BF16))
        shapes = {name: value.shape for name, value in inputs_of(made.graph).items()}
        sizes.append(build(made.write(made.options), shapes))
    plain = build(made.graph.write(GraphOptions(target=TENSORRT, precision=Precision.BF16)), shapes)
    values = sum(np.prod(shape) for shape in candidates(Stage.PRIOR, expected_tensors(wide)).values())
    for size, saved in zip(sizes, (1, 1, 1.5), strict=True):
        assert plain - size >= 0.5 * saved * values  # the rest is scales and kernels


def test_tensorrt_builds_what_bundles_have_in_fp8(
    quantise: Callable[..., Quantised], build: Callable[..., int]
) -> None:
    made = quantise(PRIOR, GraphOptions(quantization=FP8, target=PORTABLE))
    build(made.write(made.options), {name: value.shape for name, value in inputs_of(made.graph).items()})
