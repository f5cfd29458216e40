"""Timings by phase: what is added up, on a clock of ours, and what a fresh process reports."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from cascadekit import Cascade
from cascadekit.bench.commands import bench
from cascadekit.runtime import timings
from cascadekit.runtime.timings import Timings, since_start
from cascadekit.schemas.stages import Stage


def test_phases_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([-1.0, 0.0, 4.0, 4.0, 5.0, 5.0, 8.0, 10.0, 16.0, 18.0, 20.0, 20.5])
    monkeypatch.setattr(timings.time, "perf_counter", lambda: next(ticks))
    found = Timings()
    found.opened = 1.5
    found.loaded(Stage.PRIOR, 2.0)
    found.loaded(Stage.PRIOR, 1.0)
    with found.running(Stage.PRIOR):  # 19 seconds, of which steps take 4, 1, 3 and 6
        for _ in range(4):
            with found.step(Stage.PRIOR):
                pass
    with found.running(Stage.VQGAN):
        pass
    monkeypatch.setattr(timings, "since_start", lambda: 99.0)
    found.image()
    monkeypatch.setattr(timings, "since_start", lambda: 100.0)
    found.image()
    assert found.to_json() == {
        "open": 1.5,
        "load": {"prior": 3.0},
        "first_step": {"prior": 4.0},
        "step": {"prior": 3.0},
        "steps": {"prior": 10.0},
        "run": {"prior": 5.0, "vqgan": 0.5},
        "first_image": 99.0,
    }
    assert found.line() == (
        "first image after 99.00 s: open 1.50 s, load 3.00 s, first step of the prior 4.00 s, other steps 10.00 s, "
        "the rest of the stages 5.50 s"
    )


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not say when a process started")
def test_the_start_of_the_process_is_the_systems() -> None:
    before = since_start()
    elapsed = int(
        subprocess.run(["ps", "-o", "etimes=", "-p", str(os.getpid())], capture_output=True, check=True).stdout
    )
    assert before - 1 <= elapsed <= since_start() + 1


def test_the_phases_of_a_cascade(tiny: Path) -> None:
    with Cascade.open(tiny / "bundle", threads=1) as cascade:
        cascade.generate("a cat", seed=0, width=64, height=64, prior_steps=2, decoder_steps=1)
        found = cascade.timings.to_json()
    assert found["load"].keys() == {"text_encoder", "prior", "decoder", "vqgan"}
    assert found["first_step"].keys() == {"prior", "decoder"}
    assert found["steps"].keys() == {"prior"}
    assert found["run"].keys() == found["load"].keys()
    assert 0 < found["open"] < found["first_image"]
    assert min(found["run"].values()) > 0  # the prior's conditions, the decoder's sampler


def test_a_fresh_process(tiny: Path) -> None:
    options = "--size 64x64 --prior-steps 2 --decoder-steps 2 --threads 1 --rounds 1 --runs 1 --engine onnxruntime"
    command = ["first-image", str(tiny / "bundle"), *options.split(), "--device", "cpu", "--json"]
    result = CliRunner().invoke(bench, command)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    (found,) = report["rounds"]
    phases = [found["open"], *(sum(found[name].values()) for name in ("load", "first_step", "steps", "run"))]
    assert 0 < max(phases) < sum(phases) <= found["first_image"]
    assert (len(found["images"]), found["engine"], found["said"]) == (1, "onnxruntime", [])
