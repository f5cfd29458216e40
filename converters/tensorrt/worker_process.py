"""Runs a build in a process of its own, watches it, and ends it when this one is interrupted."""

import contextlib
import json
import os
import selectors
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import IO, Any

from ...schemas.errors import EngineError
from .worker_request import WorkerRequest

INTERVAL = 0.25  # seconds between two looks at the process
KILLED = -9


@dataclass(frozen=True)
class BuildProgress:
    """How a build goes: seconds so far and in all as estimated, what TensorRT is at, bytes of memory of its own.

    Most of the time is spent in one phase that has no steps, so there is no better measure than the clock."""

    name: str
    elapsed: float
    estimate: float
    phase: str
    rss: int


@dataclass(frozen=True)
class BuildOutcome:
    """The result and the cost of a build: bytes and SHA-256 of the plan, the version that wrote it, seconds, those of
    all processors, the most memory with mapped files (`peak_rss`) and without (`peak_own`)."""

    bytes: int
    sha256: str
    version: str
    seconds: float
    cpu_seconds: float
    peak_rss: int
    peak_own: int
    layers: int


OnProgress = Callable[[BuildProgress], object]


def run_build(request: WorkerRequest, name: str, estimate: float, on_progress: OnProgress) -> BuildOutcome:
    """Run the build that `request` describes in a new process; messages call it `name`.

    When this raises, also for an interruption, the process has ended; the caller removes what it wrote.

    Raises EngineError with TensorRT's own reason, or with how the process ended."""
    started = perf_counter()
    peak, phase, answer = 0, "starting", None
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        _started(request, errors) as process,
    ):
        for content in _answers(process):
            rss = own_memory(process.pid)
            peak = max(peak, rss)
            phase = content.get("phase", phase)
            answer = content if {"done", "error"} & content.keys() else answer
            on_progress(BuildProgress(name, perf_counter() - started, estimate, phase, rss))
        code = process.wait()
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if answer is None:
        raise EngineError(f"{name}: {_how_it_ended(code, peak, said)}")
    if "error" in answer:
        raise EngineError(f"{name}: {answer['error']}")
    return BuildOutcome(**answer["done"], peak_own=peak)


@contextlib.contextmanager
def _started(request: WorkerRequest, errors: IO[str]) -> Iterator[subprocess.Popen[str]]:
    """The process, in a session of its own: an interruption from the keyboard reaches this one alone, which ends it."""
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
        with contextlib.suppress(BrokenPipeError):  # it ended already; how is seen below
            process.stdin.write(request.to_line() + "\n")
            process.stdin.flush()
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]


def _answers(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """The worker's answers until it ends; an empty one ({}) whenever INTERVAL has passed without an answer."""
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


def own_memory(pid: int) -> int:
    """Bytes of memory of a process's own, without pages of files; 0 where that is not told."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    found = (line.split()[1] for line in lines if line.startswith("RssAnon:"))
    return next((int(kilobytes) * 1024 for kilobytes in found), 0)


def _how_it_ended(code: int, peak: int, said: list[str]) -> str:
    if code == KILLED:
        return (
            f"the build was killed when it held {peak / 1e9:.1f} GB; the system does that when memory runs out: close "
            "other programs, or build on a larger machine"
        )
    last = f": {said[-1]}" if said else ""
    return f"the build ended without a word (exit code {code}){last}"
