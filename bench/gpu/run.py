"""Runs the phases of the GPU benchmark, each in a process of its own, until they are done or time is up."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from ...runtime.engines.installed_packages import onnxruntimes
from ...runtime.engines.nvidia_driver import DriverGpu, first_gpu
from ...schemas.callbacks import Say, ignored
from ...schemas.errors import EngineError, UsageError
from ...schemas.precision import Precision
from ...schemas.stages import Variant
from ..machine import describe_machine
from .job import OF_BUNDLES, GpuJob
from .phases import ENGINE, SIZES, Phase, plan
from .report import GpuBenchReport
from .state import BenchState

CALL = f"from {__package__}.work import main; main()"
PROBE = "from cascadekit.runtime.engines.provider_probe import why_not; print(why_not('cuda'))"
PROBE_SECONDS = 120
MEASURING = ("engine", "image", "compile")  # works that no other needs
SHORTEST = 20  # seconds that must be left for a phase to start
REASON_LENGTH = 500
TINY_JOB = {"side": 64, "runs": 2, "prior_steps": 2, "decoder_steps": 2}
REAL_JOB = {"side": 1024, "runs": 10, "prior_steps": 20, "decoder_steps": 10}


@dataclass(frozen=True)
class GpuBench:
    """The phases to measure. `tiny` rehearses with the tiny cascade; `minutes` bounds the whole run.

    `names` are beginnings of the names of phases; empty: all. `again` measures also what the state has."""

    work: Path
    device: str = "cuda"
    variants: Sequence[Variant] = SIZES
    precisions: Sequence[Precision] = (Precision.FP16, Precision.FP32, Precision.BF16)
    engines: Sequence[str] = (ENGINE,)
    tiny: bool = False
    minutes: float = 8
    names: Sequence[str] = ()
    again: bool = False
    state: Path | None = None

    @property
    def state_path(self) -> Path:
        return self.state or self.work / "gpu-bench.json"

    @property
    def job(self) -> GpuJob:
        return GpuJob(str(self.work.absolute()), self.device, **(TINY_JOB if self.tiny else REAL_JOB))

    def phases(self) -> tuple[Phase, ...]:
        """The phases that were asked for. Raises UsageError when `names` name none."""
        found = plan((Variant.TINY,) if self.tiny else self.variants, self.precisions, self.engines)
        chosen = tuple(phase for phase in found if not self.names or phase.name.startswith(tuple(self.names)))
        if not chosen:
            raise UsageError(f"no phase is called {', '.join(self.names)}: {', '.join(phase.name for phase in found)}")
        return chosen


def bench_gpu(bench: GpuBench, say: Say = ignored) -> GpuBenchReport:
    """Run the phases that the state lacks, and report all that the state has.

    A phase that fails or takes too long is noted with its reason, and the others go on. A later run tries it again,
    last if no other needs it. Raises UsageError when `work` is no folder, or the state has other settings. Raises
    EngineError when the GPU or ONNX Runtime's provider for it cannot start: most phases would fail."""
    if not bench.work.is_dir():
        raise UsageError(f"{bench.work}: not a folder; give one on a fast disk, or in memory")
    end = perf_counter() + 60 * bench.minutes
    phases = bench.phases()
    gpu = first_gpu()
    if bench.device == "cuda":
        _require_gpu(gpu, probe=any(phase.work == "engine" and phase.engine == ENGINE for phase in phases))
    machine = {**describe_machine(bench.work, peer=True), "gpu": gpu if isinstance(gpu, str) else gpu.name}
    machine["libraries"] |= onnxruntimes()
    state = BenchState.open(bench.state_path, bench.job, machine)
    state.write()  # a file that cannot be written is an error now, and not after the first phase
    for phase in sorted(phases, key=lambda phase: phase.work in MEASURING and state.failed(phase.name)):
        missing = bench.job.lacks_files(phase) and any(_needs(each, phase, state) for each in phases)
        if state.done(phase.name) and not missing and not bench.again:
            continue
        left = end - perf_counter()
        if left < min(SHORTEST, phase.limit):
            say(f"{phase.name}: not started, {bench.minutes:g} minutes are over")
            continue
        needed = bench.job.reads(phase)
        if needed is not None and not needed.is_dir():
            say(f"{phase.name}: not started, {needed} is not there")
            continue
        run_phase(bench.job, phase, state, min(left, phase.limit))
        say(f"{phase.name}: {_line(state.phases[phase.name])}")
    state.write()
    return GpuBenchReport(state.to_json())


def _require_gpu(gpu: DriverGpu | str, *, probe: bool) -> None:
    """Raise EngineError without a GPU. With `probe`, also where ONNX Runtime cannot use it: a process of its own tries,
    since what it takes of the GPU's memory would stay."""
    if isinstance(gpu, str):
        raise EngineError(f"{gpu}; --tiny --device cpu rehearses without")
    if not probe:
        return
    try:
        tried = subprocess.run((sys.executable, "-c", PROBE), capture_output=True, text=True, timeout=PROBE_SECONDS)
        reason = tried.stdout.strip() or (tried.stderr if tried.returncode else "")
    except subprocess.TimeoutExpired:
        reason = f"it did not answer within {PROBE_SECONDS} s"
    if reason:
        raise EngineError(f"onnxruntime cannot use the GPU: {' '.join(reason.split())[-REASON_LENGTH:]}")


def _needs(other: Phase, phase: Phase, state: BenchState) -> bool:
    """True if `other` has no result yet and reads the files of `phase`."""
    if state.done(other.name) or other.variant != phase.variant:
        return False
    readers = {
        "make": ("diffusers", "compile", "export", *OF_BUNDLES),
        "diffusers": ("engine",),
        "export": OF_BUNDLES,
        "build": OF_BUNDLES,
    }
    same = {
        "diffusers": other.stage == phase.stage,
        "export": other.precision == phase.precision,
        "build": (other.precision, other.engine) == (phase.precision, phase.engine),
    }
    return other.work in readers[phase.work] and same.get(phase.work, True)


def run_phase(job: GpuJob, phase: Phase, state: BenchState, seconds: float) -> None:
    """Run one phase in a new process and keep its result, or the end of its errors."""
    began = perf_counter()
    command = (sys.executable, "-c", CALL, job.to_json(phase))
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        printed, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        state.keep(phase.name, seconds=seconds, error=f"took more than {seconds:.0f} s")
        return
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that the phase has started
            process.wait()
    took = round(perf_counter() - began, 2)
    try:
        state.keep(phase.name, seconds=took, result=json.loads(printed.splitlines()[-1]))
    except (IndexError, ValueError):
        reason = " ".join(errors.split())[-REASON_LENGTH:] or f"ended with status {process.returncode}"
        state.keep(phase.name, seconds=took, error=reason)


def _line(kept: dict[str, object]) -> str:
    if "error" in kept:
        return f"failed: {kept['error']}"
    result = kept["result"]
    assert isinstance(result, dict)
    shown = {name: value for name, value in result.items() if isinstance(value, int | float | str)}
    figures = ", ".join(f"{n} {v:.4g}" if isinstance(v, float) else f"{n} {v}" for n, v in shown.items())
    return f"{kept['seconds']} s; {figures}"
