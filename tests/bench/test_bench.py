"""The benchmark runs, and its report has every field. The figures themselves are not tested.

Workers import torch, diffusers and OpenVINO. Where many are started, they run in this process, except for one.
"""

import contextlib
import io
import json
import math
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file

from cascadekit.bench import bench_convert, cast_in_memory, engine_worker, engines, generate_worker, process, standins
from cascadekit.bench.cli import ENGINES
from cascadekit.bench.commands import bench
from cascadekit.bench.convert_speed import PEER
from cascadekit.bench.engine_worker import LOADERS, EngineJob
from cascadekit.converters.checkpoints.open_model import open_model
from cascadekit.parity.reference import build_reference
from cascadekit.runtime.engines.openvino import multiplies_bf16
from cascadekit.schemas.errors import ConversionError, UsageError
from cascadekit.schemas.stages import PRESETS, Stage, Variant

CASES = ["convert", "cp", "convert_cold", "cp_cold", "cast", "cast_in_memory", "write", "inspect", "import"]
RATIOS = ["convert / cp", "convert_cold / cp_cold", "cast / cast_in_memory", "cast / write", "inspect / import"]
FED = (Stage.TEXT_ENCODER, Stage.PRIOR, Stage.DECODER, Stage.VQGAN)
DECODER_HALF = sum(
    weight.numel() for weight in build_reference(PRESETS[Stage.VQGAN, Variant.FULL]).parameters()
)  # of the vqgan: what a bundle runs
TINY = PRESETS[Stage.PRIOR, Variant.TINY]


def call(work: Path, *arguments: object, command: str = "convert") -> Result:
    """The command, its work folder empty again at the end."""
    result = CliRunner().invoke(bench, [command, "--work", str(work), *map(str, arguments)])
    assert not list(work.iterdir())
    return result


def numbers(value: object) -> Iterator[float]:
    """Every number in a JSON document."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from numbers(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


Chosen = Callable[[process.WorkerJob], bool]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Chosen], None]:
    """A function that has the jobs for which its argument is true run in this process; their peak memory is 1 TB."""

    def install(chosen: Chosen) -> None:
        work = process.WorkerJob.work

        def run(job: process.WorkerJob, label: str) -> dict[str, Any]:
            if not chosen(job):
                return work(job, label)
            main = engine_worker.main if isinstance(job, EngineJob) else generate_worker.main
            with monkeypatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
                patch.chdir(tmp_path)  # the worker goes elsewhere
                patch.setattr(sys, "argv", ["worker", json.dumps(asdict(job))])
                patch.setattr(engine_worker, "GEMM_SECONDS", 0.01)
                patch.setattr(engine_worker, "GEMM_SHAPE", (64, 96, 128))
                main()
            return {**json.loads(printed.getvalue().splitlines()[-1]), "peak_rss": 10**12}

        monkeypatch.setattr(process.WorkerJob, "work", run)

    return install


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The commands that were measured. No process is started for them, except for one of diffusers."""
    seen: list[tuple[str, ...]] = []
    launch = process.launch

    def instead(command: Sequence[str], **options: Any) -> tuple[process.Run, list[str]]:
        seen.append(tuple(command))
        return launch(command, **options) if PEER in command else (process.Run(0.5, 2_000_000, None), [])

    monkeypatch.setattr(process, "launch", instead)
    return seen


def test_json(tmp_path: Path) -> None:
    """Every case by its own process."""
    result = call(tmp_path, "--network", "tiny", "--dtype", "bf16", "--runs", 1, "--cold", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert list(report["cases"]) == CASES
    assert list(report["ratios"]) == RATIOS
    for case in report["cases"].values():
        assert len(case["seconds"]) == len(case["cached"]) == 1
        assert 0 < case["min"] <= case["median"] <= case["max"]
        assert case["peak_rss_bytes"] > 1e6
        assert all(0 <= share <= 1 for share in case["cached"] if share is not None)
    for ratio in report["ratios"].values():
        assert ratio["each"] == [ratio["median"]]
    assert all(number >= 0 and math.isfinite(number) for number in numbers(report))
    assert {"cpu", "cores", "memory_bytes", "file_system", "device", "python", "libraries"} <= report["machine"].keys()
    assert 547_600 * 2 < report["source"]["bytes"] < 547_600 * 4
    assert "round 1 of 1: import" in result.stderr


def test_table(tmp_path: Path, commands: list[tuple[str, ...]]) -> None:
    result = call(tmp_path, "--network", "tiny", "--runs", 2)
    assert result.exit_code == 0, result.output
    assert "round 2 of 2: import" in result.stderr
    assert sum("--dtype" in command for command in commands) == 2  # the cast, once in a round
    for word in ("processor: ", "disk: ", "numpy ", "prior (tiny, original layout)", "peak MB", "convert / cp"):
        assert word in result.stdout, word
    assert "cold" not in result.stdout


@pytest.mark.usefixtures("commands")
def test_exports(tmp_path: Path) -> None:
    result = call(tmp_path, "--network", "tiny", "--runs", 2, "--json", command="export")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert list(report["cases"]) == ["link", "copy", "cp"]
    assert list(report["ratios"]) == ["link / cp", "copy / cp", "link / copy"]
    assert all(len(case["seconds"]) == 2 and case["peak_rss_bytes"] > 1e6 for case in report["cases"].values())


def test_exports_of_a_file_of_ones_own(original: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    source = original / "stage_b.safetensors"
    before = source.read_bytes()
    result = call(work, "--source", source, "--runs", 1, command="export")
    assert result.exit_code == 0, result.output
    assert "decoder (tiny, original layout)" in result.stdout
    assert "link / copy" in result.stdout
    assert source.read_bytes() == before
    assert source.stat().st_nlink == 1


def test_a_file_of_ones_own(original: Path, tmp_path: Path, commands: list[tuple[str, ...]]) -> None:
    source = original / "stage_a.safetensors"
    result = call(tmp_path, "--source", source, "--runs", 1, "--json")
    assert result.exit_code == 0, result.output
    described = json.loads(result.stdout)["source"]
    assert (described["file"], described["component"]) == ("stage_a.safetensors", "vqgan")
    # The rounds of convert, cp, cast, write and inspect, and the round of inspect that is not measured.
    assert sum(str(source) in command for command in commands) == 6


@pytest.mark.slow
def test_peer(tmp_path: Path, commands: list[tuple[str, ...]]) -> None:
    result = call(tmp_path, "--network", "tiny", "--dtype", "fp32", "--runs", 1, "--peer", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["ratios"]["peer / convert"]["median"] > 0
    assert report["source"]["bytes"] > 547_600 * 4
    assert {"diffusers", "torch"} <= report["machine"]["libraries"].keys()
    assert sum(PEER in command for command in commands) == 1


@pytest.mark.parametrize("network", standins.NETWORKS)
def test_the_stand_ins_layout_is_read_back(tmp_path: Path, network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standins, "_write_values", lambda file, name, shape, *rest, **start: hole(file, shape))
    stage, variant = standins.NETWORKS[network]
    path = standins.write_stand_in(tmp_path / "file.safetensors", PRESETS[stage, variant], "BF16")
    (component,) = open_model([path]).components.values()
    assert (component.require_sound().stage, component.variant) == (stage, variant)


def hole(file: BinaryIO, shape: tuple[int, ...]) -> None:
    file.truncate(file.seek(2 * math.prod(shape), 1))


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_stand_in_is_a_sound_file_of_finite_values(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "stage_c.safetensors"
    standins.write_stand_in(path, TINY, dtype)
    (component,) = open_model([path]).components.values()
    assert component.require_sound().variant is Variant.TINY
    assert component.dtypes.keys() == {dtype}
    if dtype == "F32":
        tensors = load_file(path).values()
        assert all(np.isfinite(tensor).all() and np.abs(tensor).max() < 2 for tensor in tensors)
        assert len({tensor.tobytes() for tensor in tensors}) == len(tensors)


def test_the_cast_in_memory_casts() -> None:
    """Its two lines of arithmetic are what they should be, or its time would be of something else."""
    values = np.array([1.0, -2.5, 1 + 2**-8, 1 + 3 * 2**-8, 3.0e38], np.float32)
    out = np.empty(5, np.uint16)
    cast_in_memory._narrow(values.view(np.uint32), out)
    assert [hex(bits) for bits in out] == ["0x3f80", "0xc020", "0x3f80", "0x3f82", "0x7f62"]
    wide = np.empty(5, np.uint32)
    cast_in_memory._widen(out, wide)
    assert wide.view(np.float32).tolist()[:3] == [1.0, -2.5, 1.0]
    assert cast_in_memory.cast_in_memory("F32", 1 << 20) > 0
    assert cast_in_memory.cast_in_memory("BF16", 1 << 20) > 0


def test_refusals(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {
        "not a folder": {"work": tmp_path / "none"},
        "expected a file of one component": {"source": original},
        "no such file": {"source": tmp_path / "none.safetensors"},
        "the peer reads the prior and the decoder": {"source": original / "stage_a.safetensors", "peer": True},
    }
    for message, arguments in cases.items():
        with pytest.raises(UsageError, match=message):
            bench_convert(**{"work": tmp_path, "network": "tiny", **arguments})
    monkeypatch.setattr("cascadekit.bench.convert_speed.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="diffusers, which is not installed"):
        bench_convert(tmp_path, network="tiny", peer=True)
    monkeypatch.setattr(standins.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(UsageError, match="GB are free"):
        bench_convert(tmp_path, network="tiny")
    assert not list(tmp_path.iterdir())


def test_a_command_that_fails_is_an_error(original: Path, tmp_path: Path) -> None:
    source = tmp_path / "stage_c.safetensors"
    source.write_bytes(struct.pack("<Q", 2) + b"{}")
    result = CliRunner().invoke(bench, ["convert", "--work", str(tmp_path), "--source", str(source)])
    assert result.exit_code == 1
    assert list(tmp_path.iterdir()) == [source]
    with pytest.raises(ConversionError, match=r"failed: .*none"):
        process.launch(("cp", str(tmp_path / "none"), str(tmp_path / "x")))


def test_engines(tmp_path: Path, in_this_process: Callable[..., None]) -> None:
    in_this_process(lambda job: isinstance(job, EngineJob) and job.engine != "onnxruntime-mapped")
    names = ["onnxruntime", "onnxruntime-mapped", "openvino", "openvino-bf16", "torch", "torch-bf16", "diffusers"]
    (tmp_path / "work").mkdir()
    result = call(
        tmp_path / "work",
        *("--stage", "tiny", "--size", "128x192", "--batch", 1, "--threads", 1, "--rounds", 1, "--runs", 3),
        *("--engines", ",".join(names), "--json"),
        command="engines",
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["sizes"] == {"batch": 1, "height": 5, "width": 3, "tokens": 77, "images": 1}
    assert list(report["engines"]) == names
    assert report["gemm"].keys() == {"numpy fp32", "torch fp32", "torch bf16"}
    for name, engine in report["engines"].items():
        assert len(engine["seconds"]) == len(engine["cpu_seconds"]) == 3
        assert len(engine["load_seconds"]) == len(engine["first_seconds"]) == 1
        assert 0 < engine["min"] <= engine["median"] <= engine["max"]
        assert engine["fraction_of_gemm"] > 0
        assert 1e6 < engine["rss_after_load"]["anonymous"] < engine["peak_rss"]
        if "bf16" in name and (name.startswith("torch") or multiplies_bf16()):  # else OpenVINO computes in fp32
            assert 1e-4 < engine["relative_l2"] < 1
        else:
            assert engine["relative_l2"] < 1e-5
    assert report["missing"] == {}
    assert "round 1 of 1: diffusers" in result.stderr


def test_engines_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_this_process: Callable[..., None]
) -> None:
    in_this_process(lambda job: True)
    installed, work = engines.find_spec, tmp_path / "work"
    work.mkdir()
    monkeypatch.setattr(engines, "find_spec", lambda name: None if name == "openvino" else installed(name))
    arguments = ["--stage", "tiny", "--size", "64x64", "--rounds", 1, "--runs", 1, "--threads", 1]
    result = call(work, *arguments, "--engines", "openvino,onnxruntime", command="engines")
    assert result.exit_code == 0, result.output
    for word in ("openvino: not installed: openvino", "relative L2", "multiply-adds", "batch 2, height 2, width 2"):
        assert word in result.stdout, word
    result = call(work, *arguments, "--engines", "openvino", command="engines")
    assert result.exit_code == 1
    assert "no engine to measure: openvino: not installed" in str(result.exception)
    assert call(work, "--engines", "abacus", command="engines").exit_code == 2
    assert set(ENGINES) == set(LOADERS)


def test_what_an_engine_is_fed() -> None:
    sizes = {
        stage: engines.port_sizes(config, (1024, 768), 3) for (stage, _), config in PRESETS.items() if stage in FED
    }
    assert sizes == {
        Stage.TEXT_ENCODER: {"batch": 3},
        Stage.PRIOR: {"batch": 3, "height": 24, "width": 18, "tokens": 77, "images": 1},
        Stage.DECODER: {"batch": 3, "height": 256, "width": 192, "effnet_height": 24, "effnet_width": 18},
        Stage.VQGAN: {"batch": 3, "height": 256, "width": 192},
    }


@pytest.mark.slow
def test_mapped_weights_stay_in_their_file(tmp_path: Path) -> None:
    """16-bit weights, which ONNX Runtime otherwise casts for good, and fp32 weights, which it rearranges."""
    for dtype in "BF16", "F32":
        report = engines.bench_engines(
            tmp_path,
            network="vqgan",
            dtype=dtype,
            engines=["onnxruntime", "onnxruntime-mapped"],
            size=(64, 64),
            batch=1,
            threads=1,
            rounds=1,
            runs=1,
        )
        fast, mapped = (report.engines[name] for name in ("onnxruntime", "onnxruntime-mapped"))
        weights = 4 * DECODER_HALF
        saved = fast.rss_after_load["anonymous"] - mapped.rss_after_load["anonymous"]
        assert 0.75 * weights < saved < 1.25 * weights, saved / weights
        saved = fast.rss_after_runs["anonymous"] - mapped.rss_after_runs["anonymous"]
        assert 0.5 * weights < saved


@pytest.mark.slow
def test_compiled_and_traced(tmp_path: Path) -> None:
    arguments = ["--stage", "tiny", "--size", "64x64", "--rounds", 1, "--runs", 1, "--json"]
    result = call(tmp_path, *arguments, "--engines", "torch-compile,torch-compile-bf16", command="engines")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["engines"]
    assert found["torch-compile"]["relative_l2"] < 1e-4
    assert 1e-4 < found["torch-compile-bf16"]["relative_l2"] < 1


class TestGenerate:
    PROGRAMS = ("onnxruntime", "openvino-bf16", "diffusers")
    QUICK = ("--tiny", "--size", "128x128", "--prior-steps", 2, "--decoder-steps", 1)

    def test_json(self, tmp_path: Path, in_this_process: Callable[..., None]) -> None:
        in_this_process(lambda job: True)
        chosen = ("--programs", ",".join(self.PROGRAMS), "--rounds", 1, "--threads", 1, "--json", *self.QUICK)
        (tmp_path / "work").mkdir()
        result = call(tmp_path / "work", *chosen, "--runs", 1, command="generate")
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        assert tuple(report["programs"]) == self.PROGRAMS
        for found in report["programs"].values():
            assert set(found["stage_seconds"]) == set(map(str, FED))
            assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in found["stage_seconds"].values())
            assert 0 < found["loop_share"] < 1
            assert len(found["ratios"]) == 1
            assert found["peak_rss"] > 1e7
        assert all(math.isfinite(number) for number in numbers(report))

    def test_table_and_a_wrong_program(self, tmp_path: Path) -> None:
        result = call(
            tmp_path, "--programs", "onnxruntime", "--rounds", 1, "--runs", 1, *self.QUICK, command="generate"
        )
        assert result.exit_code == 0, result.output
        assert "onnxruntime" in result.stdout
        result = call(tmp_path, "--programs", "abacus", command="generate")
        assert result.exit_code == 2
        assert "expected some of onnxruntime" in result.output
