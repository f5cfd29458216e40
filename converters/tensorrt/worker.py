"""The process that builds one plan. It can be killed at any moment; TensorRT itself cannot be stopped while it
compiles. It says what it does as lines of JSON, the last of them {"done": ...} or {"error": ...}."""

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

from .backend import MESSAGES, Backend, find_backend, logger_of
from .pages import forget_pages
from .worker_request import WorkerRequest

PR_SET_PDEATHSIG = 1
# Bytes of weights from which a thread gives their pages back to the system while TensorRT reads them.
LARGE = 256 << 20
SAY = Callable[..., None]


class BuildFailed(Exception):  # noqa: N818 (told to the parent, never raised to a user)
    """Its text is the line that the parent shows."""


def main() -> None:
    """Read a request from standard input, build its plan, and answer on standard output."""
    _die_with_parent()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not be taken for an answer

    def say(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")

    try:
        say(done=build(WorkerRequest.from_line(sys.stdin.readline()), say))
    except BuildFailed as error:
        say(error=str(error))
    except Exception as error:  # TensorRT's bindings raise whatever pybind11 does
        say(error=f"{type(error).__name__}: {error}".splitlines()[0])
    os._exit(0)  # without the destructors of a driver that may not be there


def build(request: WorkerRequest, say: SAY) -> dict[str, Any]:
    """Build the plan of `request` at its output, which must not exist. Returns what it took, and the plan's hash.

    Raises BuildFailed, or whatever TensorRT's bindings do."""
    started = perf_counter()
    backend = find_backend(request.backend)
    trt, logger = backend.module, logger_of(backend)
    MESSAGES.clear()
    say(phase="reading the graph")
    builder = trt.Builder(logger)
    network = builder.create_network(backend.network_flags())
    parser = trt.OnnxParser(network, logger)
    weights = Path(request.graph).parent
    if sum(path.stat().st_size for path in weights.iterdir() if path.is_file()) > LARGE:
        forget_pages(weights)
    if not parser.parse_from_file(request.graph):
        raise BuildFailed(f"{request.graph}: not read by {backend.name}: {_parse_errors(parser)}")
    config = builder.create_builder_config()
    _configure(backend, config, request)
    for profile in request.profiles:
        config.add_optimization_profile(_profile(builder, network, profile))
    monitor = _monitor(backend, say)
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
        **_memory(),
    }


def _configure(backend: Backend, config: Any, request: WorkerRequest) -> None:
    if request.targets:
        config.num_compute_capabilities = len(request.targets)
        for position, target in enumerate(request.targets):
            config.set_compute_capability(getattr(backend.module.ComputeCapability, target.upper()), position)
    tf32 = backend.flag("TF32")  # on by default, and 13 bits less than the fp32 that a graph asks for
    if tf32 is not None:
        config.clear_flag(tf32)
    if request.refittable:
        config.set_flag(backend.module.BuilderFlag.REFIT)
    if request.weight_streaming:
        streaming = backend.flag("WEIGHT_STREAMING")
        if streaming is None:
            raise BuildFailed(f"{backend.name} {backend.version} does not stream weights; build without that")
        config.set_flag(streaming)


def _profile(builder: Any, network: Any, shapes: Any) -> Any:
    """Build the optimisation profile, which gives every input of the network its range of shapes."""
    profile = builder.create_optimization_profile()
    names = [network.get_input(number).name for number in range(network.num_inputs)]
    if set(names) != set(shapes):
        raise BuildFailed(f"the graph has inputs {', '.join(names)}; expected {', '.join(shapes)} as the manifest says")
    for name in names:
        profile.set_shape(name, *(tuple(shapes[name][end]) for end in ("min", "opt", "max")))
    return profile


class _Output:
    """A file that TensorRT writes to. An error in it is kept: it must not pass through TensorRT's own code."""

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


def _compile(backend: Backend, builder: Any, network: Any, config: Any, output: _Output) -> None:
    """Write the plan as it is made where TensorRT can, which saves a copy of it in memory."""
    if hasattr(builder, "build_serialized_network_to_stream"):
        good = builder.build_serialized_network_to_stream(network, config, _stream(backend, output))
    else:
        plan = builder.build_serialized_network(network, config)
        good = plan is not None and output.write(memoryview(plan)) == output.bytes > 0
    if output.error is not None:
        raise BuildFailed(f"{output.file.name}: cannot be written: {output.error.strerror}")
    if not good or not output.bytes:
        raise BuildFailed(f"not built by {backend.name}: {MESSAGES.reason}")


def _stream(backend: Backend, output: _Output) -> Any:
    base: Any = backend.module.IStreamWriter

    class Writer(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def write(self, data: Any) -> int:
            return output.write(data)

    return Writer()


def _monitor(backend: Backend, say: SAY) -> Any:
    """Tells the outermost phase there is."""
    base: Any = getattr(backend.module, "IProgressMonitor", None)
    if base is None:
        return None

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            say(phase=phase_name, steps=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return True

        def phase_finish(self, phase_name: str) -> None:
            return None

    return Monitor()


def _timing_cache(config: Any, request: WorkerRequest) -> Any:
    """The kernel timings of earlier builds on this GPU, set in the configuration; None where nothing is measured."""
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
    with contextlib.suppress(OSError):  # it saves time alone
        path.with_suffix(".new").write_bytes(memoryview(cache.serialize()))
        path.with_suffix(".new").replace(path)


def _parse_errors(parser: Any) -> str:
    """The first thing that was wrong: what was logged tells more than what the parser keeps."""
    if MESSAGES.errors or not parser.num_errors:
        return MESSAGES.reason
    error = parser.get_error(0)
    return f"node {error.node_name()}: " * bool(error.node_name()) + " ".join(error.desc().split())


def _memory() -> dict[str, int]:
    """The most this process ever had in memory, in bytes, mapped files included."""
    status = Path("/proc/self/status")
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines()) if status.is_file() else {}
    return {"peak_rss": int(fields["VmHWM"].split()[0]) * 1024} if "VmHWM" in fields else {"peak_rss": 0}


def _die_with_parent() -> None:
    """Let the system kill this process when the one that started it ends, however that is."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
