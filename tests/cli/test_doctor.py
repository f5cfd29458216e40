"""`doctor` on this machine as it is, and on one with a GPU, which is not there."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner, Result
from cuda.bindings import runtime as cuda_runtime

from cascadekit.cli import main
from cascadekit.converters.tensorrt import BuildOptions, Built
from cascadekit.converters.tensorrt.plans_to_build import graphs_to_build
from cascadekit.parity import gpu_check
from cascadekit.parity.gpu_report import GpuReport
from cascadekit.runtime import examine_machine as doctor
from cascadekit.runtime.engines import installed_packages as installs
from cascadekit.runtime.engines.provider_probe import PROBE
from cascadekit.runtime.engines.tensorrt import cuda
from cascadekit.runtime.engines.tensorrt import host as nvidia
from cascadekit.schemas.config_json import from_json
from cascadekit.schemas.errors import EngineError
from cascadekit.schemas.precision import Precision
from cascadekit.schemas.profiles import profile_for
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import open_bundle
from cascadekit.storage.install_hint import install_hint
from helpers.fake_gpu import FakeGpu, FakeTensorRT, add_plan

HAS_GPU = cuda_runtime.cudaGetDeviceCount()[0] == cuda_runtime.cudaError_t.cudaSuccess
without_gpu = pytest.mark.skipif(HAS_GPU, reason="there is a GPU")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["doctor", *map(str, arguments)])


def test_help_has_examples() -> None:
    assert "\n  cascadekit doctor\n" in call("--help").output


def test_the_probe_is_the_identity() -> None:
    model = onnx.load_model_from_string(PROBE)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(PROBE, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"x": np.array([3.5], np.float32)})[0], [3.5])


@without_gpu
def test_on_this_machine() -> None:
    result = call()
    assert result.exit_code == 0, result.output
    assert "GPU: no NVIDIA GPU can be used here" in result.output
    found = json.loads(call("--json").output)
    assert found["packages"]["onnxruntime"] == onnxruntime.__version__
    assert (found["gpu"], found["warnings"], found["lacking_tools"]) == (None, [], {})
    engines = {(one["engine"], one["device"]): one for one in found["engines"]}
    assert len(engines) == 11
    runs = {key for key, one in engines.items() if one["runs"]}
    assert {("onnxruntime", "cpu"), ("openvino", "cpu")} <= runs
    assert all(device == "cpu" for _, device in runs)
    rtx = engines["tensorrt-rtx", "cuda"]
    assert (rtx["builds"], rtx["runs"]) == (True, False)
    assert "no NVIDIA GPU" in rtx["lacking"]
    plain = engines["tensorrt", "cuda"]
    assert (plain["version"], plain["builds"]) == (None, False)
    assert install_hint("tensorrt") in plain["lacking"]
    assert install_hint("tensorrt") in result.output
    assert all(bool(one["lacking"]) != one["runs"] for one in found["engines"])


def test_what_to_install_and_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}
    for module in (doctor, installs):
        monkeypatch.setattr(module, "installed", there.get)
    result = call()
    for text in (
        f"for verify: {install_hint('parity')}",
        f"for export, build: {install_hint('export')}",
        "to mend: onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 are installed together",
    ):
        assert text in result.output, text


@without_gpu
def test_a_gpu_that_only_nvidia_smi_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    def smi(command: Any, **wishes: Any) -> Any:
        assert command[0] == "nvidia-smi"
        return SimpleNamespace(stdout="NVIDIA GeForce RTX 4090, 8.9, 24564, 550.54.15\n")

    monkeypatch.setattr(subprocess, "run", smi)
    gpu, problem = doctor.find_gpu()
    assert gpu == doctor.Gpu("NVIDIA GeForce RTX 4090", "sm89", 24564 << 20, "550.54.15")
    assert "no NVIDIA GPU can be used" in problem


@pytest.mark.parametrize(
    ("capability", "version", "lacking"),
    [
        ((8, 9), "1.7.1.116", ""),
        ((9, 0), "1.7.1.116", "it is for sm75, sm80, sm86, sm89, sm120, sm121, this GPU is sm90; take tensorrt"),
        ((8, 9), "1.5.0.114", "too old: pip install --upgrade 'tensorrt-rtx>=1.6'"),
    ],
)
def test_tensorrt_rtx_and_the_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], version: str, lacking: str
) -> None:
    gpu = FakeGpu(capability=capability)
    monkeypatch.setattr(cuda, "import_cuda_runtime", lambda: gpu)
    monkeypatch.setattr(doctor, "import_tensorrt", lambda backend: FakeTensorRT(gpu, __version__=version))
    found = doctor.examine()
    assert found.gpu is not None
    assert (found.gpu.name, found.gpu.driver, found.gpu_problem) == ("NVIDIA Fake 4090", "CUDA 13.0", "")
    rtx = next(one for one in found.engines if one.engine == "tensorrt-rtx")
    assert (rtx.lacking, rtx.runs) == (lacking, not lacking)


@without_gpu
def test_no_gpu_to_check(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    result = call("--gpu", "-o", report)
    assert result.exit_code == 1
    assert "not checked, because no NVIDIA GPU can be used here" in result.output
    assert "0 passed, 0 failed, 34 not checked" in result.output
    found = json.loads(report.read_text())
    assert (found["passed"], found["finished"], len(found["checks"])) == (False, True, 34)
    assert {check["result"] for check in found["checks"]} == {"not checked"}
    again = call("--gpu", "-o", report)
    assert (again.exit_code, "exists already" in again.stderr) == (2, True)
    assert call("--gpu", "-o", report, "--force", "--json").exit_code == 1


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeTensorRT:
    """A machine with a GPU and TensorRT-RTX, and less to draw."""
    gpu = FakeGpu()
    trt = FakeTensorRT(gpu)

    def find(backend: str) -> FakeTensorRT:
        if backend == "tensorrt":
            raise EngineError("tensorrt is not installed")
        return trt

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cuda, "import_cuda_runtime", lambda: gpu)
    for module in (nvidia, doctor):
        monkeypatch.setattr(module, "import_tensorrt", find)
    monkeypatch.setattr(gpu_check, "SIZES", ((72, 64),))
    monkeypatch.setattr(
        gpu_check, "TIMED", {"width": 64, "height": 64, "prior_steps": 2, "decoder_steps": 2, "seed": 0}
    )
    monkeypatch.setattr(gpu_check, "PRECISIONS", (Precision.FP16,))
    return trt


def builder(types: dict[str, str] | None = None) -> Callable[[Path, BuildOptions], list[Built]]:
    """Makes plans for the FakeTensorRT; `types` are of ports of the prior's step."""

    def build(root: Path, wishes: BuildOptions) -> list[Built]:
        assert (wishes.backend, wishes.targets) == ("tensorrt-rtx", ("sm89",))
        done = []
        bundle = open_bundle(root)
        for stage, entry in bundle.manifest.stages.items():
            for graph in graphs_to_build(stage, entry, wishes.graphs):
                there = entry.graphs[graph]
                config = from_json(stage, entry.config)
                bundle = add_plan(
                    bundle,
                    stage,
                    [profile_for(config, graph, there.inputs, bounds) for bounds in wishes.profiles],
                    graph=graph,
                    types=(types or {}) if stage is Stage.PRIOR and graph == "step" else {},
                    weights=200_000,
                )
                done.append(Built(stage, bundle.entry(stage).plans[-1], "built"))
        return done

    return build


def test_everything_passes(trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_check, "build", builder())
    report = tmp_path / "report.json"
    result = call("--gpu", "-o", report)
    assert result.exit_code == 0, result.output
    assert "6 passed, 0 failed, 9 not checked" in result.output
    found = json.loads(report.read_text())
    assert (found["passed"], found["findings"]["gpu"]["capability"]) == (True, "sm89")
    checks = {check["name"]: check for check in found["checks"]}
    assert len(checks) == 15
    compared = checks["tensorrt-rtx fp16: parity"]["numbers"]["comparisons"]
    for start in (
        *("text_encoder: prompt_embeds", "text_encoder: pooled", "prior: noise_pred", "decoder: noise_pred"),
        *("vqgan: images", "teacher-forced: prior pass 4", "teacher-forced: decoder pass 3", "trajectory: image"),
    ):
        assert any(name.startswith(start) for name in compared), start
    assert max(value["relative_l2"] for value in compared.values()) > 1e-4
    assert checks["tensorrt-rtx fp16: memory"]["numbers"]["evictions"] >= 2
    assert checks["tensorrt-rtx fp16: timing"]["numbers"]["prior_step_ms"] > 0
    assert checks["tensorrt-rtx fp16: repeats"]["numbers"]["replays_cuda_graph"] is None
    assert checks["tensorrt fp16: parity"]["detail"] == "tensorrt is not installed"
    assert trt.gpu.taken == 0


def test_what_fails_is_told(trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ports in bf16 where fp32 is asked for; then a builder that refuses, and one that crashes."""
    monkeypatch.setattr(gpu_check, "PRECISIONS", (Precision.FP32,))
    monkeypatch.setattr(gpu_check, "build", builder({"sample": "BF16", "noise_pred": "BF16"}))
    report = tmp_path / "report.json"
    result = call("--gpu", "-o", report)
    assert result.exit_code == 1
    checks = {check["name"]: check for check in json.loads(report.read_text())["checks"]}
    parity = checks["tensorrt-rtx fp32: parity"]
    assert parity["result"] == "failed"
    wrong = parity["detail"].split(" | ")
    assert any(line.startswith("prior: noise_pred") and ": relative L2" in line for line in wrong)
    assert not [line for line in wrong if line.startswith(("decoder", "vqgan", "teacher-forced: decoder"))]
    assert "_parity" in parity["trace"]

    def fail(root: Path, wishes: BuildOptions) -> list[Built]:
        raise EngineError("no kernel") if root.name == "fp32" else KeyError("x")

    monkeypatch.setattr(gpu_check, "_prepare", lambda files: {})  # nothing of it is reached
    monkeypatch.setattr(gpu_check, "build", fail)
    monkeypatch.setattr(gpu_check, "PRECISIONS", (Precision.FP32, Precision.BF16))
    kept: list[GpuReport] = []
    found = gpu_check.check_gpu(kept.append)
    assert not found
    by_name = {check.name: check for check in found.checks}
    assert by_name["tensorrt-rtx fp32: build"].detail == "no kernel"
    assert by_name["tensorrt-rtx bf16: build"].detail == "KeyError: 'x'"
    assert by_name["tensorrt-rtx fp32: timing"].detail == "there are no engines to run"
    assert [len(one.checks) for one in kept] == [*range(1, len(found.checks) + 1), len(found.checks)]
    assert [one.finished for one in kept[-2:]] == [False, True]
