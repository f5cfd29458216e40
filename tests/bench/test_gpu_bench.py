"""The GPU benchmark, rehearsed on the CPU with the tiny cascade; and its kit, packed, cut and unpacked."""

import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from cascadekit.bench.commands import bench as bench_command
from cascadekit.bench.gpu import run, work
from cascadekit.bench.gpu.job import GpuJob
from cascadekit.bench.gpu.kit import BENCH, INSTALLER, pack
from cascadekit.bench.gpu.phases import Phase, plan
from cascadekit.bench.gpu.report import GpuBenchReport
from cascadekit.bench.gpu.run import GpuBench, bench_gpu
from cascadekit.bench.gpu.state import BenchState
from cascadekit.schemas.errors import UsageError
from cascadekit.schemas.precision import Precision
from cascadekit.schemas.stages import Stage, Variant

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
        "diffusers lite prior": {"seconds": 1, "result": {"memory_mb": 12000}},
        "engine lite fp16 onnxruntime prior": {"seconds": 1, "result": {"memory_mb": 3456}},
    }
    report = GpuBenchReport({"job": {"side": 1024}, "phases": phases})
    rows = {title: rows for title, _, rows in report.tables()}["lite, 1024 pixels a side: MiB of GPU memory"]
    nothing = ["not measured"] * 3
    assert rows == [["diffusers, all types", "12000", *nothing], ["fp16 onnxruntime", "3456", *nothing]]


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
    assert {row[0] for row in memory[1]} == {"diffusers, all types", *(row[0] for row in rows_of_engines(passes[1]))}
    assert {cell for row in memory[1] for cell in row[1:]} == {"not measured"}  # there is no GPU
    assert report.failed["compile tiny decoder"] == "not installed: a GPU"


def test_a_second_run_goes_on(done: GpuBench, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def fail(job: GpuJob, phase: Phase, state: BenchState, seconds: float) -> None:
        made.append(phase.name)
        state.keep(phase.name, seconds=seconds, error="out of memory")

    monkeypatch.setattr(run, "run_phase", fail)
    state = json.loads(done.state_path.read_text())
    kept = done.state_path.read_text()
    state["phases"]["engine tiny fp32 onnxruntime prior"] = {"seconds": 1, "error": "out of memory"}
    del state["phases"]["diffusers tiny vqgan"]
    done.state_path.write_text(json.dumps(state))
    bench_gpu(replace(done, state=done.state_path))
    assert made == ["diffusers tiny vqgan", "engine tiny fp32 onnxruntime prior"]
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
        bench_gpu(replace(done, device="cuda"))
    done.state_path.write_text(kept)


def test_a_phase_in_its_own_process(tmp_path: Path) -> None:
    """What fails is noted with the end of its errors, and what takes too long is ended."""
    bench = GpuBench(tmp_path, "cpu", precisions=(FP32,), tiny=True)
    state = BenchState.open(bench.state_path, bench.job, {})
    phase = Phase("engine tiny fp32 onnxruntime prior", "engine", 60, Variant.TINY, Stage.PRIOR, FP32)
    run.run_phase(bench.job, phase, state, 120)
    assert "cascade.json" in state.phases[phase.name]["error"]
    run.run_phase(bench.job, phase, state, 0.01)
    assert state.phases[phase.name]["error"] == "took more than 0 s"
    assert not state.done(phase.name)
    assert BenchState.open(bench.state_path, bench.job, {}).phases == state.phases
    bench.state_path.write_text("[]")
    with pytest.raises(UsageError, match="is no state of this benchmark"):
        BenchState.open(bench.state_path, bench.job, {})


def test_the_plan() -> None:
    names = [phase.name for phase in plan((Variant.LITE, Variant.FULL), (FP32, Precision.FP16), ("onnxruntime",))]
    assert len(set(names)) == len(names)
    lite, full = names.index("image lite fp16 onnxruntime"), names.index("export full fp32")
    assert names.index("make full") < full < lite < names.index("remove lite fp16") < names.index("compile lite prior")
    assert "engine full fp16 onnxruntime decoder without CUDA graph" in names
    assert [name for name in names if "TF32" in name] == [
        f"engine {variant} fp32 onnxruntime {stage} with TF32"
        for variant in ("lite", "full")
        for stage in ("prior", "decoder")
    ]
    listed = CliRunner().invoke(bench_command, ["gpu", "--list", "--sizes", "lite", "--precisions", "fp16"])
    assert listed.output.splitlines() == [
        phase.name for phase in plan((Variant.LITE,), (Precision.FP16,), ("onnxruntime",))
    ]


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


@pytest.fixture
def wheels(tmp_path: Path) -> list[Path]:
    """Two wheels, one of which is cut into parts."""
    made = []
    for name, size in (("small-1-py3-none-any.whl", 10), ("large-1-py3-none-any.whl", 5000)):
        path = tmp_path / name
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{name[:5]}/data.bin", np.random.default_rng(0).bytes(size))
        made.append(path)
    return made


def test_the_kit(tmp_path: Path, wheels: list[Path]) -> None:
    kit, site = tmp_path / "kit", tmp_path / "site"
    index = pack(kit, wheels, part_bytes=1000)
    parts = next(file["parts"] for file in index["files"] if file["name"].startswith("large"))
    assert len(parts) == 6
    assert max((kit / part).stat().st_size for file in index["files"] for part in file["parts"]) <= 1000
    assert _install(kit, site) == ""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                assert (site / name).read_bytes() == archive.read(name)
    ours = {path.relative_to(BENCH) for path in BENCH.rglob("*.py")}
    assert {path.relative_to(site / "cascadekit/bench") for path in (site / "cascadekit").rglob("*.py")} == ours
    (kit / parts[2]).write_bytes(b"x" * 1000)
    assert "large-1-py3-none-any.whl: damaged; expected SHA-256" in _install(kit, site)
    (kit / parts[2]).unlink()
    assert f"not there: {parts[2]}; copy them" in _install(kit, site)


def test_a_kit_in_whole_files(tmp_path: Path, wheels: list[Path]) -> None:
    pack(tmp_path / "kit", wheels)
    names = {path.name for path in (tmp_path / "kit").iterdir()}
    assert names == {*(wheel.name for wheel in wheels), "kit.json", INSTALLER.name, "cascadekit-bench.zip"}


def _install(kit: Path, site: Path) -> str:
    """What `install.py` complains about, in a Python without packages."""
    return subprocess.run(
        [sys.executable, "-I", "-S", str(kit / "install.py"), str(site)], capture_output=True, text=True, check=False
    ).stderr
