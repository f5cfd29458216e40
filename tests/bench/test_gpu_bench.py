"""The GPU benchmark, rehearsed on the CPU with the tiny cascade."""

import ctypes
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from cascadekit.bench.commands import bench as bench_command
from cascadekit.bench.gpu import diffusers_work, memory, run, work
from cascadekit.bench.gpu.job import GpuJob
from cascadekit.bench.gpu.phases import Phase, plan
from cascadekit.bench.gpu.report import GpuBenchReport
from cascadekit.bench.gpu.run import GpuBench, bench_gpu
from cascadekit.bench.gpu.state import BenchState
from cascadekit.runtime.engines.nvidia_driver import DriverGpu
from cascadekit.schemas.errors import EngineError, UsageError
from cascadekit.schemas.precision import Precision
from cascadekit.schemas.stages import Stage, Variant
from helpers.standins import accept_changes

FP32 = Precision.FP32


def here(job: GpuJob, phase: Phase, state: BenchState, seconds: float) -> None:
    """The phase in this process: a new one takes seconds to import torch."""
    state.keep(phase.name, seconds=0.0, result=json.loads(json.dumps(work.WORK[phase.work](job, phase))))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> GpuBench:
    """Everything but images in fresh processes."""
    how: dict[str, Any] = {"precisions": (FP32,), "tiny": True, "names": NAMES, "minutes": 60}
    bench = GpuBench(tmp_path_factory.mktemp("gpu"), "cpu", **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "run_phase", here)
        bench_gpu(bench)
    return bench


NAMES = ("make", "diffusers", "export", "engine", "compile")


def phases_of(bench: GpuBench) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bench.state_path.read_text())["phases"]
    return found


def test_the_rehearsal(done: GpuBench) -> None:
    phases = phases_of(done)
    assert [*phases] == [phase.name for phase in done.phases()]
    assert len(phases) == 16
    for stage in ("prior", "decoder", "vqgan", "text_encoder"):
        found = phases[f"engine tiny fp32 onnxruntime {stage}"]["result"]
        assert found["against"] == "diffusers"
        assert 0 < found["relative_l2"] < 1e-4  # another implementation of the network, on the same weights
        assert found["first_equals_later"] == 0
        assert min(found["load_s"], found["first_s"], found["ms"]) > 0
        assert phases[f"diffusers tiny {stage}"]["result"]["float32 eager"]["relative_l2"] == 0
    assert phases["compile tiny prior"]["result"] == {"missing": "a GPU"}


def rows_of_engines(rows: list[list[str]]) -> list[list[str]]:
    return [row for row in rows if not row[0].startswith("diffusers")]


def test_memory_of_the_gpu_is_in_a_table() -> None:
    phases = {
        "diffusers lite prior": {"seconds": 1, "result": {"bfloat16 eager": {"memory_mb": 12000}}},
        "engine lite fp16 onnxruntime prior": {"seconds": 1, "result": {"memory_mb": 3456, "predicted_mb": 3210}},
        "engine lite fp16 onnxruntime decoder": {"seconds": 1, "error": "out of memory"},
    }
    report = GpuBenchReport({"job": {"side": 1024}, "phases": phases})
    rows = {title: rows for title, _, rows in report.tables()}["lite, 1024 pixels a side: MiB of GPU memory"]
    assert rows == [
        ["diffusers float32 eager", "not measured", "not measured"],
        ["diffusers bfloat16 eager", "12000", "not measured"],
        ["diffusers float16 eager", "not measured", "not measured"],
        ["fp16 onnxruntime measured", "3456", "not measured"],
        ["fp16 onnxruntime predicted", "3210", "not measured"],
    ]


def test_the_tables(done: GpuBench) -> None:
    report = bench_gpu(replace(done, names=("make",)))
    tables = {title: (columns, rows) for title, columns, rows in report.tables()}
    passes, distances, memory, images = tables.values()
    assert next(iter(tables)) == "tiny, 64 pixels a side: milliseconds of a pass"
    rows = {row[0]: row[1:] for row in passes[1]}
    assert rows["diffusers float16 CUDA graph"] == ["not measured"] * 4
    assert all(float(cell) > 0 for cell in rows["fp32 onnxruntime"])
    assert {row[0] for row in distances[1]} >= {"diffusers bfloat16 eager", "fp32 onnxruntime with TF32"}
    assert images[1] == []
    kinds = [row[0] for row in rows_of_engines(passes[1])]
    predicted = {f"{kind} predicted" for kind in kinds}
    measured = {f"{kind} measured" for kind in kinds}
    eager = {f"diffusers {dtype} eager" for dtype in ("float32", "bfloat16", "float16")}
    assert {row[0] for row in memory[1]} == {*eager, *predicted, *measured}
    cells = {row[0]: row[1:] for row in memory[1]}  # there is no GPU, whose memory is predicted all the same
    assert min(float(cell) for cell in cells["fp32 onnxruntime predicted"]) >= 600
    assert {cell for name in cells.keys() - predicted for cell in cells[name]} == {"not measured"}
    assert report.failed["compile tiny decoder"] == "not installed: a GPU"


def test_an_image_of_random_weights_may_be_anything(done: GpuBench, tmp_path: Path) -> None:
    """It takes the same time. Weights of real size may overflow in fp16."""
    phase = Phase("image tiny fp32 onnxruntime", "image", 60, Variant.TINY, precision=FP32)
    job = replace(done.job, folder=str(tmp_path))
    shutil.copytree(done.job.bundle(phase), job.bundle(phase))
    (weights,) = (job.bundle(phase) / "vqgan").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    np.frombuffer(content, "<f4", offset=8 + int.from_bytes(content[:8], "little"))[:] = np.nan
    weights.write_bytes(content)
    accept_changes(job.bundle(phase))
    found = work.image(job, phase)
    assert found["open"] < found["first_image"]
    assert len(found["images"]) == 2


def test_a_second_run_goes_on(done: GpuBench, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def fail(job: GpuJob, phase: Phase, state: BenchState, seconds: float) -> None:
        made.append(phase.name)
        state.keep(phase.name, seconds=seconds, error="out of memory")

    monkeypatch.setattr(run, "run_phase", fail)
    state = json.loads(done.state_path.read_text())
    kept = done.state_path.read_text()
    state["phases"]["engine tiny fp32 onnxruntime prior"] = {"seconds": 1, "error": "out of memory"}
    for name in ("diffusers tiny vqgan", "engine tiny fp32 onnxruntime text_encoder"):
        del state["phases"][name]
    done.state_path.write_text(json.dumps(state))
    bench_gpu(replace(done, state=done.state_path))
    names = ["diffusers tiny vqgan", "engine tiny fp32 onnxruntime text_encoder", "engine tiny fp32 onnxruntime prior"]
    assert made == names  # what failed before comes last: it may fail again, and take its time
    made.clear()
    bench_gpu(replace(done, names=("make",), again=True))
    assert made == ["make tiny"]
    made.clear()
    done.state_path.write_text(kept)
    shutil.rmtree(done.job.bundle(done.phases()[5]))
    bench_gpu(replace(done, names=("make", "export")))
    assert made == []  # nothing that needs the bundle is left
    said: list[str] = []
    bench_gpu(replace(done, names=("export", "image")), said.append)
    assert made == ["export tiny fp32"]
    assert said[1].startswith("image tiny fp32 onnxruntime: not started, ")
    made.clear()
    said.clear()
    bench_gpu(replace(done, names=("image",), minutes=1e-9), said.append)
    assert (made, said) == ([], ["image tiny fp32 onnxruntime: not started, 1e-09 minutes are over"])
    with pytest.raises(UsageError, match="no phase is called none: make tiny, "):
        bench_gpu(replace(done, names=("none",)))
    with pytest.raises(UsageError, match="has results of other settings"):
        bench_gpu(replace(done, tiny=False))
    state = json.loads(kept)
    state["machine"]["gpu"] = "NVIDIA H200"
    done.state_path.write_text(json.dumps(state))
    with pytest.raises(
        UsageError, match=r"has results of another GPU \(NVIDIA H200; here: there is no NVIDIA driver\)"
    ):
        bench_gpu(replace(done, names=("make",)))
    done.state_path.write_text(kept)


def test_a_phase_in_its_own_process(tmp_path: Path) -> None:
    """A phase that fails is noted with the end of its errors; one that takes too long is ended."""
    bench = GpuBench(tmp_path, "cpu", precisions=(FP32,), tiny=True)
    state = BenchState.open(bench.state_path, bench.job, {})
    phase = Phase("engine tiny fp32 onnxruntime prior", "engine", 60, Variant.TINY, Stage.PRIOR, FP32)
    run.run_phase(bench.job, phase, state, 120)
    assert "not a bundle, nothing is there" in state.phases[phase.name]["error"]
    run.run_phase(bench.job, phase, state, 0.01)
    assert state.phases[phase.name]["error"] == "took more than 0 s"
    assert not state.done(phase.name)
    assert BenchState.open(bench.state_path, bench.job, {}).phases == state.phases
    bench.state_path.write_text("[]")
    with pytest.raises(UsageError, match="is no state of this benchmark"):
        BenchState.open(bench.state_path, bench.job, {})


def test_the_plan() -> None:
    """The phases that decide most come first: the first precision of both sizes."""
    both, bf16, fp16 = (Variant.LITE, Variant.FULL), Precision.BF16, Precision.FP16
    names = [phase.name for phase in plan(both, (fp16, FP32, bf16), ("onnxruntime", "aotinductor"))]
    assert len(set(names)) == len(names)
    order = [
        "make lite",
        "image lite fp16 onnxruntime",
        "build lite fp16",
        "engine lite fp16 aotinductor prior",
        "engine lite fp16 onnxruntime prior without CUDA graph",
        "remove lite fp16",
        "image full fp16 onnxruntime",
        "image lite fp32 onnxruntime",
        "image lite bf16 onnxruntime",
        "image full fp32 onnxruntime",
        "compile lite prior",
    ]
    assert sorted(order, key=names.index) == order
    shared = [name for name in names if "vqgan" in name or "text_encoder" in name]
    assert {name.split()[1] for name in shared} == {"lite"}  # they are the same networks in the full cascade
    without = [name for name in names if name.endswith("without CUDA graph")]
    assert {name.split()[2] for name in without} == {"fp16"}
    assert [name for name in names if "TF32" in name] == [
        f"engine {variant} fp32 onnxruntime {stage} with TF32"
        for variant in ("lite", "full")
        for stage in ("prior", "decoder")
    ]
    listed = CliRunner().invoke(bench_command, ["gpu", "--list", "--sizes", "lite", "--precisions", "fp16"])
    assert listed.output.splitlines() == [phase.name for phase in plan((Variant.LITE,), (fp16,), ("onnxruntime",))]


def test_files_that_are_gone_are_made_again(done: GpuBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a fresh machine, with the results of another: what the phases without a result read, and no more."""
    made: list[str] = []

    def note(job: GpuJob, phase: Phase, state: BenchState, seconds: float) -> None:
        made.append(phase.name)
        for path in (job.model(phase), job.bundle(phase)):
            path.mkdir(parents=True, exist_ok=True)
        state.keep(phase.name, seconds=0, result={})

    monkeypatch.setattr(run, "run_phase", note)
    state = json.loads(done.state_path.read_text())
    for stage in ("vqgan", "prior"):
        del state["phases"][f"engine tiny fp32 onnxruntime {stage}"]
    state["job"]["folder"] = str(done.work / "elsewhere")
    (done.work / "elsewhere").mkdir()
    (done.work / "elsewhere" / "gpu-bench.json").write_text(json.dumps(state))
    bench_gpu(replace(done, work=done.work / "elsewhere"))
    assert made == [
        "make tiny",
        "diffusers tiny prior",
        "diffusers tiny vqgan",
        "export tiny fp32",
        "engine tiny fp32 onnxruntime prior",
        "engine tiny fp32 onnxruntime vqgan",
    ]


def test_without_a_gpu_nothing_is_started(done: GpuBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "run_phase", lambda *given: pytest.fail("a phase was started"))
    with pytest.raises(EngineError, match="there is no NVIDIA driver; --tiny --device cpu rehearses"):
        bench_gpu(GpuBench(tmp_path, tiny=True))
    monkeypatch.setattr(run, "first_gpu", lambda: DriverGpu("NVIDIA H200", 1 << 37, "sm90"))
    with pytest.raises(EngineError, match="onnxruntime cannot use the GPU: this ONNX Runtime has no CUDAExecution"):
        bench_gpu(GpuBench(tmp_path, tiny=True))
    kept: list[str] = []

    def note(job: GpuJob, phase: Phase, state: BenchState, seconds: float) -> None:
        kept.append(state.path.read_text())
        state.keep(phase.name, error="")

    monkeypatch.setattr(run, "run_phase", note)
    # What does not need ONNX Runtime goes on; the file is there before the first phase.
    bench_gpu(GpuBench(tmp_path, tiny=True, names=("make",), state=tmp_path / "results" / "gpu.json"))
    assert [json.loads(text)["phases"] for text in kept] == [{}]


def test_the_memory_of_a_gpu_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML's calls, by their names and the layout of nvmlMemory_t: the most in use, less what was before."""
    used = [1000 << 20]

    def information(device: Any, found: Any) -> int:
        total = ctypes.cast(found, ctypes.POINTER(ctypes.c_ulonglong))
        total[0], total[1], total[2] = 1 << 37, (1 << 37) - used[0], used[0]
        return 0

    calls = {"nvmlInit_v2": lambda: 0, "nvmlDeviceGetHandleByIndex_v2": lambda index, device: 0}
    library = SimpleNamespace(**calls, nvmlDeviceGetMemoryInfo=information)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: library)
    with memory.GpuMemory() as watched:
        used[0] = 5000 << 20
        time.sleep(0.1)
        used[0] = 3000 << 20
    assert watched.megabytes == 4000
    library.nvmlInit_v2 = lambda: 999  # NVML_ERROR_UNKNOWN
    with memory.GpuMemory() as watched:
        pass
    assert watched.megabytes is None


def test_a_type_that_fails_leaves_the_others(done: GpuBench, monkeypatch: pytest.MonkeyPatch) -> None:
    make = diffusers_work._network

    def network(torch: Any, job: GpuJob, phase: Phase, dtype: str) -> Any:
        if dtype == "float32":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 14 GB")
        return make(torch, job, phase, dtype)

    monkeypatch.setattr(diffusers_work, "_network", network)
    phase = next(phase for phase in done.phases() if phase.name == "diffusers tiny vqgan")
    found = diffusers_work.measure_diffusers(done.job, phase)
    assert found["float32 eager"] == {"error": "CUDA out of memory. Tried to allocate 14 GB"}
    assert found["bfloat16 eager"]["ms"] > 0
    assert found["bfloat16 eager"]["relative_l2"] is None


def test_outputs_that_are_not_finite(tmp_path: Path) -> None:
    job = GpuBench(tmp_path, "cpu", tiny=True).job
    phase = Phase("engine", "engine", 1, Variant.TINY, Stage.VQGAN, Precision.FP16)
    job.root(phase).mkdir()
    values = {"images": np.ones((1, 3, 2, 2), np.float32)}
    assert work._parity(job, phase, values) == {"finite": True, "relative_l2": None, "against": None}
    work._parity(job, replace(phase, precision=FP32), values)  # kept to compare with
    twice = {"images": 2 * values["images"]}
    assert work._parity(job, phase, twice) == {"finite": True, "relative_l2": 1.0, "against": "own fp32"}
    assert not work._parity(job, phase, {"images": values["images"] * np.nan})["finite"]


@pytest.mark.slow
def test_packages_are_built_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The VQGAN alone: the compiler takes half a minute of processor time for it, and minutes for all stages."""
    monkeypatch.setenv("CASCADEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(work, "STAGES", (Stage.VQGAN,))
    monkeypatch.setattr(run, "run_phase", here)
    names = ("make", "export", "build", "engine tiny fp32 torch vqgan", "engine tiny fp32 aotinductor vqgan")
    how: dict[str, Any] = {"engines": ("torch", "aotinductor"), "precisions": (FP32,), "tiny": True, "names": names}
    bench = GpuBench(tmp_path, "cpu", minutes=60, **how)
    said: list[str] = []
    bench_gpu(bench, said.append)
    phases = phases_of(bench)
    assert phases["build tiny fp32"]["result"]["packages"] == 1
    for engine in ("torch", "aotinductor"):
        assert phases[f"engine tiny fp32 {engine} vqgan"]["result"]["ms"] > 0
