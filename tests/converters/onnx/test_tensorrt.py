"""TensorRT-RTX reads every graph, and builds engines of them without a GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import tensorrt_rtx as trt

from cascadekit.converters.onnx import GraphOptions, graph_ports, write_graphs
from cascadekit.schemas.precision import Precision, Target
from cascadekit.schemas.stages import (
    PRESETS,
    ImageEncoderConfig,
    NetworkConfig,
    PreviewerConfig,
    Stage,
    TextEncoderConfig,
    Variant,
)
from helpers.efficientnets import narrow_effnet

PRIOR, DECODER, VQGAN = (PRESETS[stage, Variant.TINY] for stage in (Stage.PRIOR, Stage.DECODER, Stage.VQGAN))
TEXT = TextEncoderConfig(128, 256, 2, 2, 64, vocab_size=99, eos_token_id=98)
VISION = ImageEncoderConfig(128, 256, 2, 2, 64, image_size=28)
OTHERS = (VQGAN, TEXT, VISION, narrow_effnet(), PreviewerConfig(c_hidden=16))
# Least, most likely and largest size of each symbolic dim.
SIZES = {
    "batch": (1, 2, 4),
    "steps": (1, 8, 60),
    "tokens": (1, 9, 77),
    "images": (1, 1, 2),
    "context": (4, 85, 89),
    "height/2": (4, 8, 16),
    "width/2": (4, 8, 16),
}
SIDE = (8, 16, 32)
PIXELS = (32, 64, 96)


class Log(trt.ILogger):  # type: ignore[misc]
    """Keeps errors. There is one logger for a process; what every call says of the missing driver is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        if severity <= trt.ILogger.ERROR and "cudaError 35" not in message:
            self.errors.append(message)


LOG = Log()


def parsed(path: Path) -> tuple[Any, Any, Any]:
    """Builder, network and parser, which must all live as long as one of them is used."""
    builder = trt.Builder(LOG)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, LOG)
    assert parser.parse_from_file(str(path)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    return builder, network, parser


def build(path: Path, config: NetworkConfig, options: GraphOptions, name: str) -> int:
    """Bytes of the engine for Ada (SM 8.9)."""
    LOG.errors.clear()
    builder, network, _parser = parsed(path)
    settings = builder.create_builder_config()
    settings.num_compute_capabilities = 1
    settings.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile = builder.create_optimization_profile()
    side = PIXELS if config.stage is Stage.EFFNET_ENCODER or name == "encoder" else SIDE
    for port in graph_ports(config, options, name).inputs:
        shapes = ([SIZES.get(d, side)[i] if isinstance(d, str) else d for d in port.dims] for i in range(3))
        profile.set_shape(port.name, *shapes)
    settings.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, settings)
    assert engine is not None, LOG.errors
    return int(engine.nbytes)


def written(graph: Any, options: GraphOptions) -> dict[str, Path]:
    paths = {}
    for name, model in write_graphs(graph.config, graph.weights, options).items():
        paths[name] = graph.path.with_name(f"trt_{name}.onnx")
        onnx.save(model, paths[name])
    return paths


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("target", [Target.PORTABLE, Target.TENSORRT])
@pytest.mark.parametrize("config", [PRIOR, DECODER, *OTHERS], ids=lambda c: c.stage)
def test_every_graph_is_read(
    export: Callable[..., Any], config: NetworkConfig, target: Target, precision: Precision
) -> None:
    graph = export(config)
    for name, path in written(graph, GraphOptions(precision=precision, target=target)).items():
        _builder, network, _parser = parsed(path)
        ports = graph_ports(config, name=name)
        assert [network.get_input(i).name for i in range(network.num_inputs)] == [port.name for port in ports.inputs]
        assert network.num_outputs == len(ports.outputs)


# Every network in one precision, and every precision more than once; tests of converters/tensorrt build the cascade in
# bf16, and the marker `slow` has the rest.
BUILT = [
    pytest.param(
        config,
        precision,
        id=f"{config.stage}-{precision}",
        marks=() if (number + 1 - place) % len(Precision) == 0 else pytest.mark.slow,
    )
    for number, config in enumerate((PRIOR, *OTHERS))
    for place, precision in enumerate(Precision)
]


@pytest.mark.parametrize(("config", "precision"), BUILT)
def test_engines_are_built(export: Callable[..., Any], config: NetworkConfig, precision: Precision) -> None:
    options = GraphOptions(precision=precision, target=Target.TENSORRT)
    for name, path in written(export(config), options).items():
        assert build(path, config, options, name) > 100_000


@pytest.mark.slow  # test_plans.py builds it with all of the cascade
def test_the_decoder_in_bf16_is_built(export: Callable[..., Any]) -> None:
    """Its upscalers are transposed convolutions, for which there is no bf16 kernel."""
    options = GraphOptions(precision=Precision.BF16, target=Target.TENSORRT)
    assert build(written(export(DECODER), options)["step"], DECODER, options, "step") > 1_000_000


def test_exponents_and_residuals_in_fp16_are_built(export: Callable[..., Any]) -> None:
    exponents = {"down_blocks.0": 2, "down_blocks.1": 3, "up_blocks.1": 4}
    options = GraphOptions(Precision.FP16, Target.TENSORRT, exponents, frozenset({"up_blocks.1.0"}), control=(0, 3))
    assert build(written(export(PRIOR), options)["step"], PRIOR, options, "step") > 100_000
