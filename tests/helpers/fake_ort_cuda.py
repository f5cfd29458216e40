"""An onnxruntime-gpu that is not there: sessions, bindings and values that have the traps of CUDA graphs.

- A replay reads and writes the addresses of the capture, whatever is bound; an address that was freed is an error.
- Inputs bound on the host have, in a replay, the values that they had at the capture.
- A graph belongs to the thread and the id that it was captured with. The first run of an id makes three passes.
- While a thread captures, CUDA calls of another thread end the capture with error 900.
- A kernel may keep a host array: such an input (`stale`) is read as it was at the capture.

The numbers come from ONNX Runtime's CPU kernels.
"""

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
ERROR_900 = "CUDA failure 900: operation not permitted when stream is capturing"


class FakeOrtCuda:
    """The module: what it `has`, which providers a session `starts` with, and whose the operators are then."""

    SessionOptions = onnxruntime.SessionOptions
    RunOptions = onnxruntime.RunOptions

    def __init__(
        self,
        has: Sequence[str] = (TENSORRT, CUDA, CPU),
        starts: Sequence[str] = (CUDA, CPU),
        parts: Sequence[tuple[str, Sequence[str]]] = ((CUDA, ["Conv", "MatMul"]), (CPU, ["Shape", "Gather"])),
        *,
        refuses: bool = False,
        fails_to_capture: bool = False,
        stale: Sequence[str] = (),
        releases: bool = True,
    ) -> None:
        self.has, self.starts, self.parts = list(has), list(starts), parts
        self.refuses, self.fails_to_capture, self.stale, self.releases = refuses, fails_to_capture, set(stale), releases
        self.asked: list[dict[str, Any]] = []
        self.opened: list[tuple[Path, Any]] = []  # the graph and the options of each session
        self.sessions: list[FakeSession] = []
        self.memory: dict[int, Any] = {}  # arrays by address
        self.uploads: list[int] = []  # bytes of each copy from the host
        self.downloads: list[int] = []
        self.capturing: int | None = None  # the thread that captures
        self.broken = False  # whether another thread used CUDA meanwhile
        self.on_capture: Callable[[], object] = lambda: None
        self._next = 1 << 20
        self.__file__ = __file__
        self.OrtValue = SimpleNamespace(ortvalue_from_shape_and_type=self.allocate)

    def set_default_logger_severity(self, severity: int) -> None:
        assert severity == 4

    def get_available_providers(self) -> list[str]:
        return self.has

    def InferenceSession(self, path: Path, options: Any, **wishes: Any) -> "FakeSession":  # noqa: N802
        self.call()
        self.asked.append(wishes)
        self.opened.append((path, options))
        chosen = dict(each if isinstance(each, tuple) else (each, {}) for each in wishes["providers"])
        graphs = chosen.get(CUDA, {}).get("enable_cuda_graph") == "1"
        if graphs and self.refuses:
            raise RuntimeError("This session cannot use the graph capture feature:\n  Memcpy nodes")
        self.sessions.append(FakeSession(self, onnxruntime.InferenceSession(path, options, providers=[CPU]), graphs))
        return self.sessions[-1]

    def call(self) -> None:
        """A call to CUDA."""
        if self.capturing not in (None, threading.get_ident()):
            self.broken = True
            raise RuntimeError(ERROR_900)

    def allocate(self, shape: Sequence[int], kind: Any, device: str, number: int) -> "DeviceValue":
        assert (device, number) == ("cuda", 0)
        assert not isinstance(kind, int)
        return self.place(np.frombuffer(b"\xff" * int(np.prod(shape)) * np.dtype(kind).itemsize, kind).reshape(shape))

    def place(self, array: Any) -> "DeviceValue":
        self.call()
        value = DeviceValue(self, self._next)
        self.memory[self._next] = array.copy()
        weakref.finalize(value, self.memory.pop, self._next)
        self._next += array.nbytes + 256
        return value


class DeviceValue:
    """An OrtValue in GPU memory."""

    def __init__(self, ort: FakeOrtCuda, address: int) -> None:
        self.ort, self.address = ort, address

    def shape(self) -> list[int]:
        return list(self.ort.memory[self.address].shape)

    def update_inplace(self, data: Any) -> None:
        self.ort.call()
        if isinstance(data, DeviceValue):
            data = self.ort.memory[data.address]
        else:
            assert data.flags.c_contiguous
            self.ort.uploads.append(data.nbytes)
        held = self.ort.memory[self.address]
        assert (data.shape, data.dtype) == (held.shape, held.dtype)
        held[...] = data

    def numpy(self) -> Any:
        self.ort.call()
        self.ort.downloads.append(self.ort.memory[self.address].nbytes)
        return self.ort.memory[self.address].copy()


class HostValue:
    def __init__(self, array: Any) -> None:
        self.array = array

    def numpy(self) -> Any:
        return self.array


class FakeBinding:
    def __init__(self, session: "FakeSession") -> None:
        self.session = session
        self.inputs: dict[str, Any] = {}  # a DeviceValue, or an array of the host
        self.outputs: dict[str, Any] = {}  # a DeviceValue, or the name of a device
        self.found: dict[str, Any] = {}

    def bind_ortvalue_input(self, name: str, value: DeviceValue) -> None:
        self.inputs[name] = value

    def bind_cpu_input(self, name: str, array: Any) -> None:
        assert array.flags.c_contiguous
        self.inputs[name] = array

    def bind_ortvalue_output(self, name: str, value: DeviceValue) -> None:
        self.outputs[name] = value

    def bind_output(self, name: str, device: str = "cpu") -> None:
        self.outputs[name] = device

    def get_outputs(self) -> list[Any]:
        return [self.found[name] for name in self.outputs]


class FakeSession:
    """A session; `captured` has the id and the shapes of each capture, `passes` counts runs by id, `replays` too."""

    def __init__(self, ort: FakeOrtCuda, real: Any, graphs: bool) -> None:
        self.ort, self.real, self.graphs = ort, real, graphs
        self.captured: list[tuple[str, dict[str, tuple[int, ...]]]] = []
        self.released: list[int] = []
        self.passes: Counter[str] = Counter()
        self.replays: Counter[str] = Counter()
        self._graphs: dict[tuple[int, str], Callable[[], None]] = {}
        if ort.releases:
            self.release_captured_graph = self._release

    def get_providers(self) -> list[str]:
        return self.ort.starts

    def get_provider_graph_assignment_info(self) -> list[Any]:
        return [
            SimpleNamespace(ep_name=name, get_nodes=lambda kinds=kinds: [SimpleNamespace(op_type=k) for k in kinds])
            for name, kinds in self.ort.parts
        ]

    def io_binding(self) -> FakeBinding:
        return FakeBinding(self)

    @property
    def alive(self) -> int:
        """The number of graphs that were not released."""
        return len(self._graphs)

    def run(self, names: Sequence[str], feed: dict[str, Any], options: Any = None) -> list[Any]:
        self.ort.call()
        assert self._id(options) == "-1", "captures a run on the host's buffers"
        return self.real.run(names, feed)  # type: ignore[no-any-return]

    def run_with_iobinding(self, binding: FakeBinding, options: Any = None) -> None:
        self.ort.call()
        assert binding.session is self
        graph_id = self._id(options)
        if graph_id == "-1":
            self._pass(binding, graph_id)
            return
        key = threading.get_ident(), graph_id
        if key not in self._graphs:
            self._pass(binding, graph_id)
            self._pass(binding, graph_id)
            self._graphs[key] = self._capture(binding, graph_id)
        self.replays[graph_id] += 1
        self._graphs[key]()

    def _release(self, number: int) -> None:
        self.released.append(number)
        del self._graphs[threading.get_ident(), str(number)]

    def _id(self, options: Any) -> str:
        """Without an id, a session with graphs captures as 0."""
        if not self.graphs:
            return "-1"
        return options.get_run_config_entry("gpu_graph_id") if options else "0"

    def _capture(self, binding: FakeBinding, graph_id: str) -> Callable[[], None]:
        self.ort.capturing, self.ort.broken = threading.get_ident(), False
        try:
            self.ort.on_capture()
            if self.ort.broken or self.ort.fails_to_capture:
                raise RuntimeError(ERROR_900)
        finally:
            self.ort.capturing = None
        frozen = {name: self._value(each).copy() for name, each in binding.inputs.items()}
        addresses = {name: each.address for name, each in binding.inputs.items() if isinstance(each, DeviceValue)}
        written = {name: each.address for name, each in binding.outputs.items()}
        self.captured.append((graph_id, {name: array.shape for name, array in frozen.items()}))

        def replay() -> None:
            fed = {
                name: self.ort.memory[addresses[name]] if name in addresses.keys() - self.ort.stale else frozen[name]
                for name in frozen
            }
            for name, array in zip(written, self.real.run([*written], fed), strict=True):
                self.ort.memory[written[name]][...] = array

        return replay

    def _pass(self, binding: FakeBinding, graph_id: str) -> None:
        self.passes[graph_id] += 1
        fed = {name: self._value(each) for name, each in binding.inputs.items()}
        binding.found = {}
        for name, array in zip(binding.outputs, self.real.run([*binding.outputs], fed), strict=True):
            target = binding.outputs[name]
            if isinstance(target, DeviceValue):
                assert self.ort.memory[target.address].shape == array.shape
                self.ort.memory[target.address][...] = array
                binding.found[name] = target
            else:
                binding.found[name] = HostValue(array) if target == "cpu" else self.ort.place(array)

    def _value(self, bound: Any) -> Any:
        return self.ort.memory[bound.address] if isinstance(bound, DeviceValue) else bound
