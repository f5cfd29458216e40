"""The process that builds one plan. It can be killed at any time, while TensorRT itself cannot be interrupted.

It writes its progress as lines of JSON. The last line is {"done": ...} or {"error": ...}."""

import contextlib
import ctypes
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from ...runtime.memory.free_memory import byte_fields
from .backend import MESSAGES, InstalledTensorRT, find_backend, logger_of
from .process_memory import release_pages
from .worker_request import WorkerRequest

PR_SET_PDEATHSIG = 1
LARGE = 256 << 20  # bytes of weights from which their pages are released while TensorRT reads them
SendAnswer = Callable[..., None]  # called with the fields of a line of JSON


class BuildFailed(Exception):  # noqa: N818 (sent to the parent, never raised to a user)
    """A failed build; its text is the line that the parent shows."""


def main() -> None:
    """Read a request from standard input, build its plan, and answer on standard output."""
    serve(lambda line, answer: build(WorkerRequest.from_line(line), answer))


def serve(make: Callable[[str, SendAnswer], dict[str, Any]]) -> None:
    """Call `make` with the line on standard input, answer what it returns or raises, and end the process."""
    _die_with_parent()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # a line that a library prints must not be taken for an answer

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")

    try:
        answer(done=make(sys.stdin.readline(), answer))
    except BuildFailed as error:
        answer(error=str(error))
    except Exception as error:  # TensorRT's bindings raise any exception of pybind11
        answer(error=f"{type(error).__name__}: {error}".splitlines()[0])
    os._exit(0)  # skip the destructors of a driver that may be absent


def build(request: WorkerRequest, answer: SendAnswer) -> dict[str, Any]:
    """Build the plan of `request` at its output, which must not exist. Returns the fields of a `BuildOutcome`.

    Raises BuildFailed, or any exception of TensorRT's bindings."""
    started = perf_counter()
    backend = find_backend(request.backend)
    trt, logger = backend.module, logger_of(backend)
    MESSAGES.clear()
    answer(phase="reading the graph")
    builder = trt.Builder(logger)
    network = builder.create_network(backend.network_flags())
    parser = trt.OnnxParser(network, logger)
    weights = Path(request.graph).parent
    if sum(path.stat().st_size for path in weights.iterdir() if path.is_file()) > LARGE:
        release_pages(weights)
    if not parser.parse_from_file(request.graph):
        raise BuildFailed(f"{request.graph}: {backend.name} cannot read it: {_parse_error(parser)}")
    config = builder.create_builder_config()
    _configure(backend, config, request)
    for profile in request.profiles:
        config.add_optimization_profile(_profile(builder, network, profile))
    monitor = _monitor(backend, answer)
    if hasattr(config, "progress_monitor"):
        config.progress_monitor = monitor
    timing = _timing_cache(config, request)
    with Path(request.output).open("xb") as file:
        writer = _Output(file)
        _compile(backend, builder, network, config, writer)
        file.flush()
        os.fsync(file.fileno())
    _save_timing_cache(timing, request)
    return {
        "bytes": writer.bytes,
        "sha256": writer.digest.hexdigest(),
        "version": backend.version,
        "seconds": perf_counter() - started,
        "cpu_seconds": sum(os.times()[:2]),
        "layers": network.num_layers,
        "peak_rss": byte_fields(Path("/proc/self/status")).get("VmHWM", 0),  # mapped files included
    }


def _configure(backend: InstalledTensorRT, config: Any, request: WorkerRequest) -> None:
    if request.targets:
        config.num_compute_capabilities = len(request.targets)
        for position, target in enumerate(request.targets):
            config.set_compute_capability(getattr(backend.module.ComputeCapability, target.upper()), position)
    tf32 = backend.flag("TF32")  # on by default, with 13 bits less precision than fp32
    if tf32 is not None:
        config.clear_flag(tf32)
    if request.refittable:
        config.set_flag(backend.module.BuilderFlag.REFIT)
    if request.weight_streaming:
        streaming = backend.flag("WEIGHT_STREAMING")
        if streaming is None:
            raise BuildFailed(
                f"{backend.name} {backend.version} cannot stream weights; build with weight_streaming=False"
            )
        config.set_flag(streaming)


def _profile(builder: Any, network: Any, shapes: Any) -> Any:
    """The optimisation profile with the range of shapes of every input of the network."""
    profile = builder.create_optimization_profile()
    names = [network.get_input(number).name for number in range(network.num_inputs)]
    if set(names) != set(shapes):
        raise BuildFailed(f"the graph has inputs {', '.join(names)}; expected {', '.join(shapes)} as the manifest says")
    for name in names:
        profile.set_shape(name, *(tuple(shapes[name][end]) for end in ("min", "opt", "max")))
    return profile


class _Output:
    """A file that TensorRT writes to. It keeps an OSError, which must not pass through TensorRT's own code."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.bytes = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            return 0
        self.digest.update(data)
        self.bytes += len(data)
        return len(data)


def _compile(backend: InstalledTensorRT, builder: Any, network: Any, config: Any, output: _Output) -> None:
    """Compile, and write the plan to `output`; as a stream if TensorRT can, which saves a copy in memory."""
    if hasattr(builder, "build_serialized_network_to_stream"):
        good = builder.build_serialized_network_to_stream(network, config, _stream(backend, output))
    else:
        plan = builder.build_serialized_network(network, config)
        good = plan is not None and output.write(memoryview(plan)) == output.bytes > 0
    if output.error is not None:
        raise BuildFailed(f"{output.file.name}: cannot be written: {output.error.strerror}")
    if not good or not output.bytes:
        raise BuildFailed(f"{backend.name} cannot build it: {MESSAGES.reason}")


def _stream(backend: InstalledTensorRT, output: _Output) -> Any:
    base: Any = backend.module.IStreamWriter

    class PlanWriter(base):  # type: ignore[misc]
        def write(self, data: Any) -> int:
            return output.write(data)

    return PlanWriter()


def _monitor(backend: InstalledTensorRT, answer: SendAnswer) -> Any:
    """A progress monitor that reports the current phase; None when this TensorRT has no monitors."""
    base: Any = getattr(backend.module, "IProgressMonitor", None)
    if base is None:
        return None

    class Monitor(base):  # type: ignore[misc]
        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            answer(phase=phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return True

        def phase_finish(self, phase_name: str) -> None:
            return None

    return Monitor()


def _timing_cache(config: Any, request: WorkerRequest) -> Any:
    """Give the configuration the kernel timings of earlier builds on this GPU; None when nothing is measured."""
    if request.timing_cache is None or not hasattr(config, "create_timing_cache"):
        return None
    path = Path(request.timing_cache)
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _save_timing_cache(cache: Any, request: WorkerRequest) -> None:
    if cache is None or request.timing_cache is None:
        return
    path = Path(request.timing_cache)
    with contextlib.suppress(OSError):  # a missing cache only costs time
        path.with_suffix(".new").write_bytes(memoryview(cache.serialize()))
        path.with_suffix(".new").replace(path)


def _parse_error(parser: Any) -> str:
    """The first error: from the log, which says more than the parser, or from the parser."""
    if MESSAGES.errors or not parser.num_errors:
        return MESSAGES.reason
    error = parser.get_error(0)
    return f"node {error.node_name()}: " * bool(error.node_name()) + " ".join(error.desc().split())


def _die_with_parent() -> None:
    """Let the system kill this process when its parent process ends in any way."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
