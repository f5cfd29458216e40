"""Runs a build in a worker process, reports its progress, and ends it when this process is interrupted."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import IO, Any

from ...runtime.memory.free_memory import byte_fields
from ...schemas.errors import EngineError
from .worker_request import WorkerRequest

INTERVAL = 0.25  # seconds between two reports of progress
KILLED = -9


@dataclass(frozen=True)
class BuildProgress:
    """The progress of a build. TensorRT spends most of the time in one phase without steps, so time is the measure."""

    name: str
    elapsed: float  # seconds so far
    estimate: float  # seconds in all
    phase: str  # the name of TensorRT's current phase
    rss: int  # bytes of memory of the process's own


@dataclass(frozen=True)
class BuildOutcome:
    """The result and the cost of a build."""

    bytes: int  # of the plan
    sha256: str  # of the plan
    version: str  # of the TensorRT that wrote it
    seconds: float
    cpu_seconds: float  # of all processors
    peak_rss: int  # bytes of memory, mapped files included
    peak_own: int  # bytes of memory without mapped files
    layers: int


OnProgress = Callable[[BuildProgress], object]


def run_build(request: WorkerRequest, name: str, estimate: float, on_progress: OnProgress) -> BuildOutcome:
    """Run the build that `request` describes in a new process; messages call it `name`.

    The process has ended when this function returns or raises, also for an interruption. The caller removes its output.
    Raises EngineError with TensorRT's own reason, or with the way in which the process ended."""
    started = perf_counter()
    peak, phase, answer = 0, "starting", None
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        _started(request, errors) as process,
    ):
        for content in _answers(process):
            rss = byte_fields(Path(f"/proc/{process.pid}/status")).get("RssAnon", 0)
            peak = max(peak, rss)
            phase = content.get("phase", phase)
            answer = content if {"done", "error"} & content.keys() else answer
            on_progress(BuildProgress(name, perf_counter() - started, estimate, phase, rss))
        code = process.wait()
        errors.seek(0)
        printed = errors.read().strip().splitlines()
    if answer is None:
        raise EngineError(f"{name}: {_how_it_ended(code, peak, printed)}")
    if "error" in answer:
        raise EngineError(f"{name}: {answer['error']}")
    return BuildOutcome(**answer["done"], peak_own=peak)


@contextlib.contextmanager
def _started(request: WorkerRequest, errors: IO[str]) -> Iterator[subprocess.Popen[str]]:
    """The worker, in a session of its own: Ctrl-C reaches only this process, which then ends the worker."""
    process = subprocess.Popen(
        request.command(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        encoding="utf-8",
        start_new_session=True,
    )
    try:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the worker has ended; the caller finds out how
            process.stdin.write(request.to_line() + "\n")
            process.stdin.flush()
        yield process
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the compilers that it started
        process.wait()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]


def _answers(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """The worker's answers until it ends, and an empty answer after each INTERVAL without one."""
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            if not selector.select(INTERVAL):
                yield {}
                continue
            read = os.read(descriptor, 1 << 16)
            if not read:
                return
            *lines, pending = (pending + read).split(b"\n")
            for line in lines:
                with contextlib.suppress(ValueError):
                    yield json.loads(line)


def _how_it_ended(code: int, peak: int, printed: list[str]) -> str:
    if code == KILLED:
        return (
            f"the build was killed when it had {peak / 1e9:.1f} GB of memory; the system kills processes when memory "
            "runs out: close other programs, or build on a larger machine"
        )
    last = f": {printed[-1]}" if printed else ""
    return f"the build ended without a message (exit code {code}){last}"
