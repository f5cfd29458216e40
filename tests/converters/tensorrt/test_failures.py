"""Builds that fail, are killed or interrupted: one line, no process left, nothing half-written."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from cascadekit.cli import main
from cascadekit.converters.tensorrt import BuildOptions, BuildProgress, build
from cascadekit.converters.tensorrt import plans_to_build as tasks
from cascadekit.converters.tensorrt.worker_process import run_build
from cascadekit.converters.tensorrt.worker_request import WorkerRequest
from cascadekit.schemas.errors import EngineError, UsageError
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import open_bundle

DECODER = BuildOptions(targets=("sm89",), stages=(Stage.DECODER,))
VQGAN = BuildOptions(targets=("sm89",), stages=(Stage.VQGAN,))


def children(pid: int) -> list[int]:
    threads = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for thread in threads for child in (thread / "children").read_text().split()]


def is_there(pid: int) -> bool:
    """Whether a process runs; one that ended and nobody has asked for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def files(bundle: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in bundle.rglob("*") if path.is_file()}


@contextmanager
def unchanged(bundle: Path) -> Iterator[None]:
    before = files(bundle)
    yield
    assert files(bundle) == before
    assert not list(bundle.rglob(".*"))
    assert not open_bundle(bundle).entry(Stage.DECODER).plans


def test_a_killed_build(bundle: Path) -> None:
    others = children(os.getpid())  # such as the server of processes that other tests kill

    def kill(progress: BuildProgress) -> None:
        if progress.phase != "starting":
            (worker,) = set(children(os.getpid())).difference(others)
            os.kill(worker, signal.SIGKILL)

    words = "^decoder/model for sm89: the build was killed when it had"
    with unchanged(bundle), pytest.raises(EngineError, match=words):
        build(bundle, DECODER, on_progress=kill)


def test_an_interrupted_build(bundle: Path) -> None:
    workers: list[int] = []
    others = children(os.getpid())

    def interrupt(progress: BuildProgress) -> None:
        if progress.phase != "starting":
            workers.extend(set(children(os.getpid())).difference(others))
            raise KeyboardInterrupt

    with unchanged(bundle):
        with pytest.raises(KeyboardInterrupt):
            build(bundle, DECODER, on_progress=interrupt)
        assert not is_there(workers[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_whole_command_ends(bundle: Path, number: signal.Signals) -> None:
    """Its worker ends with it. The next build throws away what a kill leaves behind. Ctrl-C is tested above."""
    command = (sys.executable, "-c", "from cascadekit.cli import main; main()")
    arguments = ("build", str(bundle), "--arch", "sm89", "--stage", "decoder")
    before = files(bundle)
    with subprocess.Popen((*command, *arguments), stderr=subprocess.PIPE, text=True) as process:
        while not (started := list(bundle.glob(".building/*.plan"))):
            assert process.poll() is None
            time.sleep(0.02)
        (worker,) = children(process.pid)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    deadline = time.monotonic() + 10
    while is_there(worker) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_there(worker)
    if number is not signal.SIGKILL:
        assert process.returncode == 128 + number
        assert said.endswith("interrupted; no half-written output is left\n")
        assert files(bundle) == before
    else:
        assert started[0].exists()
        build(bundle, VQGAN)
        assert not started[0].exists()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Files cannot grow beyond `size` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk(bundle: Path) -> None:
    with unchanged(bundle), largest_file(1 << 20):
        result = CliRunner().invoke(main, ["build", str(bundle), "--arch", "sm89", "--stage", "vqgan"])
    assert result.exit_code == 1
    (last,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert last.startswith("error: vqgan/model for sm89: ")
    assert last.endswith(".plan: cannot be written: File too large")


def test_two_at_once(bundle: Path) -> None:
    def again(progress: BuildProgress) -> None:
        with pytest.raises(UsageError, match="another process is writing it"):
            build(bundle, VQGAN)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(bundle, VQGAN, on_progress=again)


def test_the_reason_is_tensorrts_own(
    exported: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without what it says of the missing driver after every failure."""
    bundle = shutil.copytree(exported("fp32"), tmp_path / "bundle")
    monkeypatch.setattr(tasks, "refusal", lambda *arguments: None)
    with pytest.raises(EngineError, match="FP32 GEMM is not supported") as caught:
        build(bundle, BuildOptions(targets=("sm75",), stages=(Stage.TEXT_ENCODER,)))
    assert str(caught.value).startswith("text_encoder/model for sm75: tensorrt-rtx cannot build it: ")
    assert "cuda" not in str(caught.value).lower()
    assert "\n" not in str(caught.value)


def test_a_graph_whose_weights_moved(bundle: Path, tmp_path: Path) -> None:
    """As the process that builds sees it, should they go after they were checked."""
    (bundle / "vqgan/weights.safetensors").unlink()
    job = WorkerRequest("tensorrt-rtx", str(bundle / "vqgan/model.onnx"), str(tmp_path / "plan"), ("sm89",), ())
    with pytest.raises(EngineError) as caught:
        run_build(job, "vqgan", 1.0, lambda progress: None)
    folder = bundle / "vqgan"
    reason = f"tensorrt-rtx cannot read it: Failed to open file: {folder / 'weights.safetensors'}"
    assert str(caught.value) == f"vqgan: {folder / 'model.onnx'}: {reason}"
    assert not (tmp_path / "plan").exists()


def test_a_process_that_cannot_start(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        WorkerRequest, "command", lambda job: (sys.executable, "-c", "raise SystemExit('no memory for a word')")
    )
    words = r"ended without a message \(exit code 1\): no memory for a word"
    with unchanged(bundle), pytest.raises(EngineError, match=words):
        build(bundle, VQGAN)
