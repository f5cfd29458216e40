"""The engine that runs the networks in PyTorch: against ONNX Runtime, in each precision, and its refusals."""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cascadekit import export
from cascadekit.runtime.engines import cpu_flags, engine_table
from cascadekit.runtime.engines.engine_table import EngineChoice, make_engine
from cascadekit.runtime.engines.pytorch import captured_calls
from cascadekit.runtime.engines.pytorch.captured_calls import CapturedCalls
from cascadekit.runtime.engines.pytorch.tensors import bundle_tensors, read_tensor
from cascadekit.schemas.config_json import from_json
from cascadekit.schemas.errors import EngineError
from cascadekit.schemas.precision import Precision
from cascadekit.schemas.stages import Block, Stage, UNetConfig
from cascadekit.schemas.unet_blocks import blocks_of
from cascadekit.storage.bundle import Bundle, open_bundle
from cascadekit.storage.install_hint import install_hint

SIZES = {"batch": 2, "height": 20, "width": 24, "effnet_height": 5, "effnet_width": 6, "tokens": 77, "images": 1}
GRAPHS = [(stage, "model") for stage in (Stage.TEXT_ENCODER, Stage.PRIOR, Stage.DECODER, Stage.VQGAN)]
# Measured: 5e-7 and 0.012. Rounding the ratio itself to bf16 is off by a third.
MOST = {"torch": 2e-6, "torch-bf16": 0.02}


def inputs_of(bundle: Bundle, stage: Stage, graph: str = "model") -> dict[str, Any]:
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {"timestep_ratio": np.array([0.93, 0.35], np.float32)}
    for port in bundle.entry(stage).graphs[graph].inputs:
        shape = [SIZES.get(dim, 1) if isinstance(dim, str) else dim for dim in port.dims]  # a residual is 1x1
        integers = port.dtype == "int64"
        drawn = rng.integers(0, 60, shape) if integers else rng.standard_normal(shape, dtype=np.float32)
        found.setdefault(port.name, drawn)
    names = {port.name for port in bundle.entry(stage).graphs[graph].inputs}
    return {name: array for name, array in found.items() if name in names}


def off(found: Any, expected: Any) -> float:
    return max(float(np.linalg.norm(found[n] - expected[n]) / np.linalg.norm(expected[n])) for n in expected)


def test_blocks_that_repeat_are_compiled_alone(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes minutes and is left out. The blocks handed to torch.compile are counted, and compute the same."""
    compiled: list[Any] = []

    def compile_module(module: torch.nn.Module, **how: Any) -> None:
        assert how == {"dynamic": False}
        compiled.append(module)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_module)
    bundle = open_bundle(tiny / "bundle")
    inputs = inputs_of(bundle, Stage.DECODER)
    expected = make_engine("torch", bundle).load(Stage.DECODER)(inputs)
    assert compiled == []
    engine = make_engine("torch-compiled", bundle)
    assert engine.name == "torch-compiled"
    assert off(engine.load(Stage.DECODER)(inputs), expected) == 0
    config = from_json(Stage.DECODER, bundle.entry(Stage.DECODER).config)
    assert isinstance(config, UNetConfig)
    wanted = sum(block.kind in (Block.RES, Block.ATTENTION) for block in blocks_of(config))
    assert len({id(module) for module in compiled}) == len(compiled) == wanted > 4


@pytest.mark.parametrize(("stage", "graph"), [*GRAPHS, (Stage.VQGAN, "encoder")])
def test_it_gives_what_onnxruntime_gives(tiny: Path, stage: Stage, graph: str) -> None:
    bundle = open_bundle(tiny / "bundle")
    inputs = inputs_of(bundle, stage, graph)
    expected = make_engine("onnxruntime", bundle).load(stage, graph)(inputs)
    for name, most in MOST.items():
        with make_engine(name, bundle).load(stage, graph) as runner:
            found = runner(inputs)
            assert {key: value.shape for key, value in found.items()} == {k: v.shape for k, v in expected.items()}
            assert off(found, expected) < most, name
            some = dict(list(inputs.items())[1:])
            rest = {key: value for key, value in inputs.items() if key not in some}
            assert off(runner.bind(some)(rest), found) == 0
        with pytest.raises(EngineError, match="closed already"):
            runner(inputs)


@pytest.mark.parametrize("layout", ["original", "model"])
def test_weights_of_linked_files(tiny: Path, tmp_path: Path, layout: str) -> None:
    """Original files join q, k and v, and have other names; the graphs take them as they are."""
    stages = [Stage.PRIOR, Stage.VQGAN]
    export(tiny / layout, tmp_path / "bundle", weights="link", stages=stages)
    linked, copied = open_bundle(tmp_path / "bundle"), open_bundle(tiny / "bundle")
    for stage in stages:
        expected = bundle_tensors(copied, stage)
        found = bundle_tensors(linked, stage)
        assert found.keys() == expected.keys()
        assert all(torch.equal(read_tensor(found[name]), read_tensor(expected[name])) for name in expected)


def test_refusals(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = open_bundle(tiny / "bundle")
    with pytest.raises(EngineError, match=r'device="cuda": torch \S+ finds no GPU here; .*device="cpu"'):
        make_engine("torch", bundle, "cuda")
    with pytest.raises(EngineError, match="prior: engine torch has no graph 'step', only model"):
        make_engine("torch", bundle).load(Stage.PRIOR, "step")
    runner = make_engine("torch", bundle).load(Stage.VQGAN)
    with pytest.raises(EngineError, match="expected inputs latents, found x"):
        runner({"x": np.zeros(1, np.float32)})
    monkeypatch.setattr(runner, "_compute", lambda **given: given["latents"] @ torch.zeros(7, 7))
    given = {"latents": np.zeros((1, 4, 8, 8), np.float32)}
    with pytest.raises(EngineError, match=r"^vqgan: torch failed: [^\n]*$"):
        runner(given)
    monkeypatch.setattr(runner, "_device", torch.device("cuda:99"))  # which no machine has
    for fails in (lambda: runner(given), lambda: runner.bind(given)):
        with pytest.raises(EngineError, match=r"^vqgan: torch failed: [^\n]*$"):
            fails()
    engine: Any = make_engine("torch", bundle)
    engine.device = "cuda:99"
    with pytest.raises(EngineError, match=r"^vqgan: torch cannot load it: [^\n]*$"):
        engine.load(Stage.VQGAN)

    def changed(**fields: Any) -> Bundle:
        entry = bundle.entry(Stage.PRIOR).model_copy(update=fields)
        stages = {**bundle.manifest.stages, Stage.PRIOR: entry}
        return Bundle(bundle.root, bundle.manifest.model_copy(update={"stages": stages}))

    with pytest.raises(EngineError, match=r"prior: its weights are int8, .* set engine=\"onnxruntime\""):
        make_engine("torch", changed(quantization="int8")).load(Stage.PRIOR)
    scaled = changed(precision=Precision.FP16, exponents={"down.0": 3})
    with pytest.raises(EngineError, match=r"prior: its fp16 graphs keep large sums .* engine=\"torch-bf16\""):
        make_engine("torch", scaled).load(Stage.PRIOR)
    make_engine("torch-bf16", scaled).load(Stage.PRIOR)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(EngineError, match=re.escape(f"PyTorch is not installed: {install_hint('torch')}")):
        make_engine("torch", bundle)


def test_a_controlnets_residual_is_not_left_out(whole: Any) -> None:
    """Zeros change nothing, and stand for no ControlNet; anything else would be lost."""
    bundle = open_bundle(whole.bundle)
    inputs = inputs_of(bundle, Stage.PRIOR)
    control = {name for name in inputs if name.startswith("control")}
    assert control
    plain = {name: value for name, value in inputs.items() if name not in control}
    runner = make_engine("torch", bundle).load(Stage.PRIOR)
    expected = make_engine("onnxruntime", bundle).load(Stage.PRIOR)(plain)
    assert off(runner(plain), expected) < 2e-5
    with pytest.raises(EngineError, match=r"prior: engine torch does not add control\.\d+ of a ControlNet"):
        runner({**plain, **{name: np.ones((2, *inputs[name].shape[1:]), np.float32) for name in control}})


def test_auto_takes_torch_in_bf16_where_openvino_is_missing(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, choices: tuple[EngineChoice, ...]
) -> None:
    monkeypatch.setattr(engine_table, "CHOICES", choices)
    monkeypatch.setattr(engine_table, "WORTH_A_START", 0)
    monkeypatch.setitem(sys.modules, "openvino", None)
    bundle = open_bundle(tiny / "bundle")
    for has, name in ((True, "torch-bf16"), (False, "onnxruntime")):
        monkeypatch.setattr(cpu_flags, "multiplies_bf16", lambda has=has: has)
        assert make_engine("auto", bundle).name == name
    monkeypatch.setitem(sys.modules, "torch", None)
    assert make_engine("auto", bundle).name == "onnxruntime"


class FakeGraph:
    """Stands in for a CUDA graph: replaying runs the function again and writes into the outputs of the capture."""

    made: list["FakeGraph"] = []  # noqa: RUF012 (the graphs of one test)

    def __init__(self) -> None:
        self.replay: Any = None
        self.made.append(self)


class Context:
    def __init__(self, *given: Any, **options: Any) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *failed: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...


def test_a_graph_is_captured_for_each_shape_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, torch.Tensor]] = []

    def compute(**inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.append(inputs)
        outputs = {"y": inputs["a"] * 2 + inputs["b"]}
        graph = FakeGraph.made[-1] if FakeGraph.made else None
        if graph is not None and graph.replay is None:
            graph.replay = lambda: outputs["y"].copy_(inputs["a"] * 2 + inputs["b"])
        return outputs

    FakeGraph.made.clear()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    for name in ("graph", "stream", "Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Context)
    run = CapturedCalls(compute)
    for size in (3, 3, 5, 3):
        a, b = torch.rand(size), torch.rand(size)
        assert torch.equal(run(a=a, b=b)["y"], a * 2 + b)
    assert len(FakeGraph.made) == 2
    assert len(calls) == 2 * (captured_calls.WARM_UPS + 1)
    for size in range(10, 10 + captured_calls.MOST_GRAPHS):
        run(a=torch.rand(size), b=torch.rand(size))
    before = len(FakeGraph.made)
    run(a=torch.rand(5), b=torch.rand(5))
    assert len(FakeGraph.made) == before + 1, "the graph of an old shape was kept"
