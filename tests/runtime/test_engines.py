"""Every engine on the tiny cascade: numbers against the PyTorch reference, memory, choice, errors."""

import gc
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cascadekit import Cascade, export
from cascadekit.converters.checkpoints.open_model import open_model
from cascadekit.parity.compare_engine import compare_engine
from cascadekit.parity.reference.loading import reference_engine
from cascadekit.parity.reference_run import ReferenceOutputs, run_reference
from cascadekit.runtime.engines import cpu_flags, engine_table, openvino
from cascadekit.runtime.engines.engine_table import ENGINES, EngineChoice, make_engine
from cascadekit.runtime.engines.onnxruntime import OnnxRuntimeEngine
from cascadekit.runtime.engines.openvino import OpenVinoEngine
from cascadekit.schemas.config_json import to_json
from cascadekit.schemas.errors import EngineError, UsageError
from cascadekit.schemas.precision import Precision
from cascadekit.schemas.stages import PRESETS, Stage, Variant
from cascadekit.storage.bundle import open_bundle
from cascadekit.storage.install_hint import install_hint
from helpers.standins import accept_changes

FILES = {Stage.PRIOR: "stage_c", Stage.DECODER: "stage_b", Stage.VQGAN: "stage_a"}
ON_THE_CPU = [name for name in ENGINES if not {"tensorrt", "aotinductor", "compiled"} & {*name.split("-")}]
BF16_ERROR = 0.02  # eight bits in every product and sum; what was measured is 0.009


def errors(engine: object, expected: ReferenceOutputs, stages: Sequence[Stage] = ()) -> dict[str, float]:
    """Relative L2 against the outputs of the fp32 reference for everything that verify compares."""
    report = compare_engine(engine, expected, engine.bundle, stages)  # type: ignore[arg-type,attr-defined]
    return {comparison.name: comparison.relative_l2 for comparison in report.comparisons}


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-mapped", "openvino"])
def test_fp32_engines_equal_the_reference(tiny: Path, tiny_outputs: ReferenceOutputs, name: str) -> None:
    engine = make_engine(name, open_bundle(tiny / "bundle"), threads=1)
    assert engine.name == name
    found = errors(engine, tiny_outputs)
    assert max(found.values()) < 1e-5, found
    assert any("trajectory" in compared for compared in found)


@pytest.mark.parametrize(
    ("stage", "dtype", "remainder"),
    [
        (Stage.PRIOR, torch.float32, 1),
        (Stage.DECODER, torch.float16, 5),
        (Stage.VQGAN, torch.bfloat16, 5),
        pytest.param(Stage.PRIOR, torch.bfloat16, 3, marks=pytest.mark.slow),
        pytest.param(Stage.DECODER, torch.float32, 6, marks=pytest.mark.slow),
        pytest.param(Stage.VQGAN, torch.float16, 3, marks=pytest.mark.slow),
    ],
)
def test_linked_weights_at_any_byte(
    original: Path, tmp_path: Path, stage: Stage, dtype: torch.dtype, remainder: int
) -> None:
    """Original files put no tensor at a multiple of its size; 16-bit ones are cast by the graph."""
    source = tmp_path / f"{FILES[stage]}.safetensors"
    tensors = load_file(original / source.name)
    save_file({name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}, source)
    content = source.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end] + b" " * ((remainder - end) % 8)
    source.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
    export(source, tmp_path / "bundle", weights="link")
    bundle = open_bundle(tmp_path / "bundle")
    expected = run_reference(reference_engine(open_model([source]), [stage]), bundle, [stage], kinds=[Precision.FP32])
    for engine in (
        OpenVinoEngine(bundle),
        OnnxRuntimeEngine(bundle, mapped=True),
    ):
        found = errors(engine, expected, [stage])
        assert max(found.values()) < 1e-5, (engine.name, found)


def test_bf16_is_near(tiny: Path, tiny_outputs: ReferenceOutputs) -> None:
    """Timesteps too: with their sines in bf16, stages B and C are off by a third."""
    engine = OpenVinoEngine(open_bundle(tiny / "bundle"), precision=Precision.BF16, threads=1)
    assert engine.name == "openvino-bf16"
    found = errors(engine, tiny_outputs, [Stage.PRIOR, Stage.DECODER, Stage.VQGAN, Stage.TEXT_ENCODER])
    assert max(found.values()) < BF16_ERROR, found


@pytest.mark.parametrize("engine", ON_THE_CPU)
def test_a_cascade_on_any_engine(tiny: Path, engine: str) -> None:
    settings = {"seed": 0, "width": 128, "height": 64, "prior_steps": 2, "decoder_steps": 2}
    with Cascade.open(tiny / "bundle", engine=engine, threads=1, memory="staged") as cascade:
        image = np.asarray(cascade.generate("x", **settings).images[0], np.float32)
    with Cascade.open(tiny / "bundle") as cascade:
        expected = np.asarray(cascade.generate("x", **settings).images[0], np.float32)
    assert image.shape == (64, 128, 3)
    assert np.abs(image - expected).mean() < (2 if engine.endswith("bf16") else 0.01)


def test_engines_have_the_threads_of_the_environment(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch and numpy have them. With 0, an engine decides itself."""
    bundle = open_bundle(tiny / "bundle")
    for variable, asked, expected in (("1", None, 1), ("1,2", None, 1), ("3", 1, 1), ("0", None, 0), ("two", None, 0)):
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
        session = OnnxRuntimeEngine(bundle, threads=asked).load(Stage.VQGAN)._session
        assert session.get_session_options().intra_op_num_threads == expected
        compiled = OpenVinoEngine(bundle, threads=asked).load(Stage.VQGAN)._body
        assert compiled.get_property("INFERENCE_NUM_THREADS") == expected or not expected  # at most one a core


@pytest.mark.parametrize("has_bf16", [True, False])
def test_openvino_refuses_bf16_graphs(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_bf16: bool, choices: tuple[EngineChoice, ...]
) -> None:
    """OpenVINO 2026.4 would load them and return noise: a relative error of 0.6 in the VQGAN, on any CPU."""
    export(tiny / "model", tmp_path / "bundle", stages=[Stage.VQGAN], precision="bf16")
    monkeypatch.setattr(engine_table, "WORTH_A_START", 0)
    bundle = open_bundle(tmp_path / "bundle")
    monkeypatch.setattr(cpu_flags, "may_compute_bf16", lambda: has_bf16)
    monkeypatch.setattr(openvino, "multiplies_bf16", lambda: has_bf16)
    for precision in (None, Precision.BF16):
        with pytest.raises(EngineError, match=r"vqgan: its graphs compute in bf16.* --precision vqgan=fp32"):
            OpenVinoEngine(bundle, precision=precision, threads=1).load(Stage.VQGAN)
    assert not next(choice for choice in choices if choice.name == "openvino-bf16").can_run(bundle)


def test_auto_takes_bf16_where_the_cpu_has_it(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, choices: tuple[EngineChoice, ...]
) -> None:
    monkeypatch.setattr(engine_table, "CHOICES", choices)
    monkeypatch.setattr(engine_table, "WORTH_A_START", 0)
    bundle = open_bundle(tiny / "bundle")
    monkeypatch.setattr(cpu_flags, "multiplies_bf16", lambda: False)
    monkeypatch.setattr(cpu_flags, "may_compute_bf16", lambda: True)
    for has, name in ((True, "openvino-bf16"), (False, "onnxruntime")):
        monkeypatch.setattr(openvino, "multiplies_bf16", lambda has=has: has)
        assert make_engine("auto", bundle).name == name
    monkeypatch.setattr(openvino, "multiplies_bf16", lambda: pytest.fail("the device is no CPU"))
    with pytest.raises(EngineError, match="CUDAExecutionProvider"):
        make_engine("auto", bundle, "cuda")


@pytest.mark.parametrize(
    ("variant", "size", "name"),
    [
        (Variant.TINY, (1024, 1024), "onnxruntime"),
        (Variant.ICONS, (128, 128), "onnxruntime"),
        (Variant.LITE, (512, 512), "openvino-bf16"),
        (Variant.FULL, (1024, 1024), "openvino-bf16"),
    ],
)
def test_auto_takes_bf16_where_it_is_worth_its_start(
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    choices: tuple[EngineChoice, ...],
    variant: Variant,
    size: tuple[int, int],
    name: str,
) -> None:
    """Compiling the example model's graphs takes seconds, and one image of ONNX Runtime a fifth of a second."""
    monkeypatch.setattr(engine_table, "CHOICES", choices)
    for module in (cpu_flags, openvino):
        monkeypatch.setattr(module, "multiplies_bf16", lambda: True)
    monkeypatch.setattr(cpu_flags, "may_compute_bf16", lambda: True)
    monkeypatch.setattr(engine_table, "require_torch", lambda: None)
    bundle = open_bundle(tiny / "bundle")
    configs = {
        stage: entry.model_copy(update={"config": to_json(PRESETS[stage, variant])})
        for stage, entry in bundle.manifest.stages.items()
        if stage in (Stage.PRIOR, Stage.DECODER)
    }
    stages = {**bundle.manifest.stages, **configs}
    manifest = bundle.manifest.model_copy(update={"stages": stages, "default_size": size})
    assert make_engine("auto", replace(bundle, manifest=manifest)).name == name


def test_auto_asks_torch_for_nothing_where_the_cpu_has_no_bf16(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, choices: tuple[EngineChoice, ...]
) -> None:
    """Importing torch took three of the four seconds of a small image."""
    monkeypatch.setattr(engine_table, "CHOICES", choices)
    monkeypatch.setattr(engine_table, "WORTH_A_START", 0)
    monkeypatch.setattr(openvino, "multiplies_bf16", lambda: False)
    monkeypatch.setattr(cpu_flags, "CPUINFO", tiny / "missing")
    monkeypatch.setattr(engine_table, "require_torch", lambda: pytest.fail("torch was imported"))
    assert make_engine("auto", open_bundle(tiny / "bundle")).name == "onnxruntime"


@pytest.mark.parametrize(
    ("line", "asked"),
    [
        ("flags\t\t: fpu avx2 avx512f", False),
        ("flags\t\t: fpu avx512_bf16", True),
        ("flags\t\t: fpu avx2 avx_ne_convert", True),
        ("Features\t: fp asimd bf16", True),
        ("vendor_id\t: none", True),  # nothing is known
    ],
)
def test_auto_imports_openvino_only_for_a_cpu_that_may_have_bf16(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    choices: tuple[EngineChoice, ...],
    line: str,
    asked: bool,
) -> None:
    monkeypatch.setattr(engine_table, "CHOICES", choices)
    monkeypatch.setattr(engine_table, "WORTH_A_START", 0)
    monkeypatch.setattr(cpu_flags, "multiplies_bf16", lambda: False)
    monkeypatch.setattr(cpu_flags, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    questions: list[bool] = []

    def ask() -> bool:
        questions.append(True)
        return False

    monkeypatch.setattr(openvino, "multiplies_bf16", ask)
    assert make_engine("auto", open_bundle(tiny / "bundle")).name == "onnxruntime"
    assert bool(questions) is asked


def test_auto_does_without_openvino(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, choices: tuple[EngineChoice, ...]
) -> None:
    monkeypatch.setattr(engine_table, "CHOICES", choices)
    monkeypatch.setattr(engine_table, "WORTH_A_START", 0)
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr(cpu_flags, "multiplies_bf16", lambda: False)
    assert make_engine("auto", open_bundle(tiny / "bundle")).name == "onnxruntime"
    with pytest.raises(EngineError, match=re.escape(install_hint("openvino"))):
        Cascade.open(tiny / "bundle", engine="openvino")


def test_refusals(tiny: Path) -> None:
    bundle = open_bundle(tiny / "bundle")
    with pytest.raises(UsageError, match=r"engine 'abacus': expected auto, onnxruntime, .*openvino-bf16"):
        make_engine("abacus", bundle)
    with pytest.raises(UsageError, match="0 threads"):
        make_engine("onnxruntime", bundle, threads=0)
    with pytest.raises(EngineError, match="openvino runs on cpu only"):
        make_engine("openvino", bundle, "cuda")


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "openvino-bf16"])
def test_a_damaged_graph_and_wrong_inputs(tiny: Path, tmp_path: Path, name: str) -> None:
    export(tiny / "model", tmp_path / "bundle", stages=[Stage.VQGAN])
    bundle = open_bundle(tmp_path / "bundle")
    runner = make_engine(name, bundle).load(Stage.VQGAN)
    with pytest.raises(EngineError, match="expected inputs latents, found x"):
        runner({"x": np.zeros(1, np.float32)})
    runner.close()
    graph = tmp_path / "bundle/vqgan/model.onnx"
    graph.write_bytes(bytes(graph.stat().st_size))
    accept_changes(bundle.root)
    bundle = open_bundle(bundle.root)
    with pytest.raises(EngineError, match=r"model\.onnx: (no ONNX graph|.* cannot load the vqgan): [^\n]*$"):
        make_engine(name, bundle).load(Stage.VQGAN)


def test_openvino_calls_nobody(tiny: Path, tmp_path: Path) -> None:
    """Importing it sends an event and leaves an identity in the home folder, unless it finds no telemetry package."""
    script = """
import socket, sys
from pathlib import Path
socket.socket.connect = socket.create_connection = lambda *args: sys.exit("connected")
from cascadekit.storage.bundle import open_bundle
from cascadekit.runtime.engines.openvino import OpenVinoEngine
from cascadekit.schemas.stages import PRESETS, Stage, Variant
OpenVinoEngine(open_bundle(Path(sys.argv[1]))).load(Stage.VQGAN).close()
assert "openvino" in sys.modules
found = [name for name in sys.modules if name.startswith("openvino_telemetry")]
assert not found, found
"""
    environment = {**os.environ, "HOME": str(tmp_path)}
    command = [sys.executable, "-c", script, str(tiny / "bundle")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "holder"), [("onnxruntime", "_session"), ("openvino-bf16", "_body")])
def test_closing_frees_the_weights_without_the_collector(tiny: Path, name: str, holder: str) -> None:
    """No reference cycle holds them: closing a stage need not collect garbage."""
    runner = make_engine(name, open_bundle(tiny / "bundle"), threads=1).load(Stage.DECODER)
    shapes = {"sample": (1, 4, 18, 26), "clip_text_pooled": (1, 1, 12), "effnet": (1, 16, 5, 7), "timestep_ratio": (1,)}
    run = runner.bind({port: np.ones(shape, np.float32) for port, shape in shapes.items() if port != "sample"})
    run({"sample": np.ones(shapes["sample"], np.float32)})
    held = weakref.ref(getattr(runner, holder))
    gc.disable()
    try:
        runner.close()
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", [*ON_THE_CPU, "torch"])
def test_a_stage_is_called_bound_and_closed(tiny: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The protocol that every engine follows; those of TensorRT have tests of their own."""
    torch_engine = reference_engine(open_model([tiny / "model"]), [Stage.DECODER])
    engine = torch_engine if name == "torch" else make_engine(name, open_bundle(tiny / "bundle"), threads=1)
    random = np.random.default_rng(0)
    shapes = {"sample": (2, 4, 18, 26), "clip_text_pooled": (2, 1, 12), "effnet": (2, 16, 5, 7)}
    inputs = {port: random.standard_normal(shape, np.float32) for port, shape in shapes.items()}
    inputs["timestep_ratio"] = np.array([0.9, 0.2], np.float32)
    with engine.load(Stage.DECODER) as runner:
        closed: list[object] = []
        close = runner.close
        monkeypatch.setattr(runner, "close", lambda: (closed.append(runner), close()))
        whole = runner(inputs)["noise_pred"]
        fixed = {port: inputs.pop(port) for port in ("clip_text_pooled", "effnet")}
        assert np.array_equal(runner.bind(fixed)(inputs)["noise_pred"], whole)
        assert not closed
    assert closed == [runner]
