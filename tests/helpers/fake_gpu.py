"""A GPU that is not there: CUDA's runtime and a TensorRT in memory, as strict as the real ones and no faster.

Copies, launches and runs are put on a stream and done when it is synchronised. A "plan" is a line of JSON that names an
ONNX graph; what it computes comes from ONNX Runtime's CPU kernels, an implementation of the graph that is not ours.
"""

import ctypes
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
from cuda.bindings import runtime as real

from cascadekit.schemas.manifest import to_text
from cascadekit.schemas.plan_entries import (
    Backend,
    DeviceEntry,
    ImageSize,
    PlanEntry,
    PlanSource,
    PortShapes,
    ProfileEntry,
)
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import Bundle, open_bundle

ERROR = real.cudaError_t
NUMPY = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "INT64": np.int64,
    "INT32": np.int32,
}
ONNX_TYPES = {"float32": "FLOAT", "int64": "INT64"}


class DataType(Enum):
    FLOAT, HALF, BF16, INT64, INT32, FP8 = range(6)


class FakeGpu:
    """Device memory, streams and graphs, with the functions of cuda.bindings.runtime that `Cuda` calls."""

    cudaMemcpyKind = real.cudaMemcpyKind  # noqa: N815
    cudaStreamCaptureMode = real.cudaStreamCaptureMode  # noqa: N815
    cudaStreamNonBlocking = real.cudaStreamNonBlocking  # noqa: N815

    def __init__(self, memory: int = 1 << 30, capability: tuple[int, int] = (8, 9)) -> None:
        self.total = memory
        self.capability = capability
        self.blocks: dict[int, bytearray] = {}
        self.reserved = 0  # what TensorRT takes for itself
        self.calls: list[str] = []
        self.uploads: list[int] = []  # bytes, one for each copy to the device
        self._next = 1 << 20
        self._pending: dict[int, list[Callable[[], None]]] = {}
        self._capturing: dict[int, list[Callable[[], None]]] = {}
        self._graphs: dict[int, list[Callable[[], None]]] = {}

    @property
    def taken(self) -> int:
        return self.reserved + sum(map(len, self.blocks.values()))

    def reserve(self, nbytes: int) -> bool:
        if self.taken + nbytes > self.total:
            return False
        self.reserved += nbytes
        return True

    def read(self, address: int, nbytes: int) -> bytes:
        block = self.blocks[address]
        assert nbytes <= len(block), "reads beyond what was allocated"
        return bytes(block[:nbytes])

    def write(self, address: int, content: bytes) -> None:
        block = self.blocks[address]
        assert len(content) <= len(block), "writes beyond what was allocated"
        block[: len(content)] = content

    def put(self, stream: int, work: Callable[[], None]) -> None:
        (self._capturing if stream in self._capturing else self._pending)[stream].append(work)

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:  # noqa: N802
        return ERROR.cudaSuccess, 1

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:  # noqa: N802
        major, minor = self.capability
        name = b"NVIDIA Fake 4090"
        return ERROR.cudaSuccess, SimpleNamespace(name=name, major=major, minor=minor, totalGlobalMem=self.total)

    def cudaDriverGetVersion(self) -> tuple[Any, ...]:  # noqa: N802
        return ERROR.cudaSuccess, 13000

    def cudaRuntimeGetVersion(self) -> tuple[Any, ...]:  # noqa: N802
        return ERROR.cudaSuccess, 13050

    def cudaGetErrorString(self, status: Any) -> tuple[Any, ...]:  # noqa: N802
        return real.cudaGetErrorString(status)  # type: ignore[no-any-return]

    def cudaMemGetInfo(self) -> tuple[Any, ...]:  # noqa: N802
        return ERROR.cudaSuccess, self.total - self.taken, self.total

    def cudaMalloc(self, nbytes: int) -> tuple[Any, ...]:  # noqa: N802
        assert not self._capturing, "allocates while a stream is captured"
        if self.taken + nbytes > self.total:
            return ERROR.cudaErrorMemoryAllocation, None
        address, self._next = self._next, self._next + nbytes + 256
        self.blocks[address] = bytearray(b"\xff" * nbytes)  # NaN, where somebody reads what nobody wrote
        return ERROR.cudaSuccess, address

    def cudaFree(self, address: int) -> tuple[Any, ...]:  # noqa: N802
        for stream in self._pending:
            self.cudaStreamSynchronize(stream)
        del self.blocks[address]
        return (ERROR.cudaSuccess,)

    def cudaMemcpyAsync(self, to: int, source: int, nbytes: int, kind: Any, stream: int) -> tuple[Any, ...]:  # noqa: N802
        if kind == real.cudaMemcpyKind.cudaMemcpyHostToDevice:
            self.uploads.append(nbytes)
            self.put(stream, lambda: self.write(to, ctypes.string_at(source, nbytes)))
        else:
            self.put(stream, lambda: ctypes.memmove(to, self.read(source, nbytes), nbytes) and None)
        return (ERROR.cudaSuccess,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:  # noqa: N802
        assert flags == real.cudaStreamNonBlocking
        self._next += 1
        self._pending[self._next] = []
        return ERROR.cudaSuccess, self._next

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:  # noqa: N802
        assert not self._pending.pop(stream)
        return (ERROR.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:  # noqa: N802
        work, self._pending[stream] = self._pending[stream], []
        for one in work:
            one()
        return (ERROR.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> tuple[Any, ...]:  # noqa: N802
        assert mode in real.cudaStreamCaptureMode
        self._capturing[stream] = []
        self.calls.append("begin capture")
        return (ERROR.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:  # noqa: N802
        return ERROR.cudaSuccess, self._capturing.pop(stream)

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, ...]:  # noqa: N802
        self._next += 1
        self._graphs[self._next] = list(graph)
        return ERROR.cudaSuccess, self._next

    def cudaGraphDestroy(self, graph: Any) -> tuple[Any, ...]:  # noqa: N802
        graph.clear()
        return (ERROR.cudaSuccess,)

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[Any, ...]:  # noqa: N802
        self.calls.append("launch")
        for work in self._graphs[graph]:
            self.put(stream, work)
        return (ERROR.cudaSuccess,)

    def cudaGraphExecDestroy(self, graph: int) -> tuple[Any, ...]:  # noqa: N802
        del self._graphs[graph]
        return (ERROR.cudaSuccess,)


class ILogger:
    ERROR = 1

    def log(self, severity: int, text: str) -> None:
        raise NotImplementedError


@dataclass
class FakeTensorRT:
    """The module. `rtx` is whether it is TensorRT-RTX, which captures CUDA graphs itself and keeps kernels."""

    gpu: FakeGpu
    rtx: bool = True
    __version__: str = "1.7.1.116"
    capturable: bool = True
    kernels: bytes = b"kernels of this GPU"
    graph_strategies: list[Any] = field(default_factory=list)
    loaded_kernels: list[bytes] = field(default_factory=list)

    ILogger = ILogger

    def __post_init__(self) -> None:
        self.ExecutionContextAllocationStrategy = Enum("Strategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED")
        if self.rtx:
            self.ComputeCapability = Enum("ComputeCapability", "NONE CURRENT SM75 SM80 SM86 SM89 SM120 SM121")
            self.CudaGraphStrategy = Enum("CudaGraphStrategy", "DISABLED WHOLE_GRAPH_CAPTURE")

    def __hash__(self) -> int:
        return id(self)

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        return SimpleNamespace(deserialize_cuda_engine=lambda content: self._deserialize(bytes(content), logger))

    def _deserialize(self, content: bytes, logger: Any) -> Any:
        if not content.startswith(b"{"):
            logger.log(ILogger.ERROR, "IRuntime::deserializeCudaEngine: Error Code 1: magicTag == kEXPECTED_MAGIC_TAG")
            return None
        plan = json.loads(content)
        if not self.gpu.reserve(plan["weights"] - plan["streamable"]):
            logger.log(ILogger.ERROR, "Error Code 2: OutOfMemory (Requested size was 1 bytes.)")
            return None
        return FakeEngine(self, plan, logger)


class FakeEngine:
    def __init__(self, trt: FakeTensorRT, plan: dict[str, Any], logger: Any) -> None:
        self.trt, self.plan, self.logger = trt, plan, logger
        self.resident = plan["weights"] - plan["streamable"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(plan["onnx"], options, providers=["CPUExecutionProvider"])
        self.ports = [*plan["inputs"], *plan["outputs"]]
        self.num_io_tensors = len(self.ports)
        self.num_optimization_profiles = len(plan["profiles"])
        self.streamable_weights_size = plan["streamable"]
        self._budget = 0

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, nbytes: int) -> None:
        assert 0 <= nbytes <= self.streamable_weights_size
        self._budget = nbytes

    def get_tensor_name(self, index: int) -> str:
        return self.ports[index]  # type: ignore[no-any-return]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self.plan["types"][name]]

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return self.plan["scratch"][profile]  # type: ignore[no-any-return]

    def create_runtime_config(self) -> Any:
        return FakeConfig(self.trt) if self.trt.rtx else PlainConfig()

    def create_execution_context(self, config: Any) -> Any:
        assert config.strategy.name == "ON_PROFILE_CHANGE"
        if not self.trt.gpu.reserve(self._budget):
            self.logger.log(ILogger.ERROR, "CUDA error: out of memory")
            return None
        self.resident += self._budget
        if self.trt.rtx:
            self.trt.graph_strategies.append(config.cuda_graph_strategy)
        return FakeContext(self)

    def __del__(self) -> None:
        if hasattr(self, "resident"):
            self.trt.gpu.reserved -= self.resident


class PlainConfig:
    strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy


class FakeConfig(PlainConfig):
    cuda_graph_strategy: Any = None

    def __init__(self, trt: FakeTensorRT) -> None:
        self.trt = trt

    def create_runtime_cache(self) -> Any:
        def deserialize(blob: bytes) -> bool:
            self.trt.loaded_kernels.append(blob)
            return blob == self.trt.kernels

        return SimpleNamespace(deserialize=deserialize, serialize=lambda: self.trt.kernels)

    def set_runtime_cache(self, cache: Any) -> bool:
        return True


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.profile: int | None = None
        self.scratch = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.inferred: dict[Any, dict[str, tuple[int, ...]]] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        gpu = self.engine.trt.gpu
        gpu.reserved -= self.scratch
        self.scratch = self.engine.plan["scratch"][profile]
        if not gpu.reserve(self.scratch):
            self.scratch = 0
            self.engine.logger.log(ILogger.ERROR, "Error Code 2: OutOfMemory (Requested size was 2 bytes.)")
            return False
        self.profile, self.shapes = profile, {}
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, most = self.engine.plan["profiles"][self.profile][name]
        if all(low <= side <= high for low, side, high in zip(least, shape, most, strict=True)):
            self.shapes[name] = tuple(shape)
            return True
        self.engine.logger.log(ILogger.ERROR, f"{name} is not within the profile")
        return False

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine.plan["inputs"] if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        key = tuple(sorted(self.shapes.items()))
        if key not in self.inferred:
            outputs = self._run({port: np.ones(shape, np.int64) for port, shape in self.shapes.items()})
            self.inferred[key] = {port: array.shape for port, array in outputs.items()}
        return self.inferred[key][name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address in self.engine.trt.gpu.blocks
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        gpu = self.engine.trt.gpu
        if stream in gpu._capturing and not self.engine.trt.capturable:
            self.engine.logger.log(ILogger.ERROR, "cannot be captured")
            return False
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        assert addresses.keys() == set(self.engine.ports)

        def work() -> None:
            gpu.calls.append("run")
            inputs = {}
            for name, shape in shapes.items():
                dtype = np.dtype(NUMPY[self.engine.plan["types"][name]])
                content = gpu.read(addresses[name], int(np.prod(shape)) * dtype.itemsize)
                inputs[name] = np.frombuffer(content, dtype).reshape(shape)
            for name, array in self._run(inputs).items():
                dtype = np.dtype(NUMPY[self.engine.plan["types"][name]])
                gpu.write(addresses[name], array.astype(dtype).tobytes())

        gpu.put(stream, work)
        return True

    def _run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        kinds = {
            port.name: np.int64 if "int64" in port.type else np.float32 for port in self.engine.session.get_inputs()
        }
        fed = {name: array.astype(kinds[name]) for name, array in inputs.items()}
        names = self.engine.plan["outputs"]
        return dict(zip(names, self.engine.session.run(names, fed), strict=True))

    def __del__(self) -> None:
        self.engine.trt.gpu.reserved -= self.scratch


def profile_of(ports: Mapping[str, tuple[tuple[int, ...], ...]], least: int, likely: int, most: int) -> ProfileEntry:
    """A profile for square images of these sides, one or two at a time."""
    sizes = (ImageSize(width=side, height=side, images=n) for side, n in ((least, 1), (likely, 1), (most, 2)))
    names = ("min", "opt", "max")
    shapes = {name: PortShapes(**dict(zip(names, three, strict=True))) for name, three in ports.items()}
    return ProfileEntry(**dict(zip(names, sizes, strict=True)), ports=shapes)


def shapes_for(bundle: Bundle, stage: Stage, graph: str, sizes: Mapping[str, tuple[int, int, int]]) -> dict[str, Any]:
    """Least, likeliest and largest shapes of a graph's inputs, of sizes of its symbolic dims."""
    return {
        port.name: tuple(
            tuple(sizes[dim][which] if isinstance(dim, str) else dim for dim in port.dims) for which in range(3)
        )
        for port in bundle.entry(stage).graphs[graph].inputs
    }


def add_plan(
    bundle: Bundle,
    stage: Stage,
    profiles: list[ProfileEntry],
    *,
    graph: str = "model",
    backend: Backend = "tensorrt-rtx",
    version: str = "1.7.1.116",
    targets: tuple[str, ...] = ("sm89",),
    types: Mapping[str, str] = {},
    weights: int = 10_000,
    streamable: int = 0,
    scratch: int = 100,
    refittable: bool = False,
    name: str = "plan",
    ports: tuple[str, ...] | None = None,
) -> Bundle:
    """The bundle with one more plan, which the FakeTensorRT runs; `weights` and what follows are bytes it takes."""
    entry = bundle.entry(stage)
    there = entry.graphs[graph]
    onnx_path = bundle.root / there.path
    content = {
        "onnx": str(onnx_path),
        "inputs": [port.name for port in there.inputs],
        "outputs": list(ports or [port.name for port in there.outputs]),
        "types": {port.name: ONNX_TYPES[port.dtype] for port in (*there.inputs, *there.outputs)} | dict(types),
        "profiles": [
            {port: [shapes.min, shapes.max] for port, shapes in profile.ports.items()} for profile in profiles
        ],
        "weights": weights,
        "streamable": streamable,
        "scratch": [scratch * (number + 1) for number in range(len(profiles))],
    }
    data = json.dumps(content).encode().ljust(weights)
    path = f"{stage}/{graph}.{name}.plan"
    (bundle.root / path).write_bytes(data)
    plan = PlanEntry(
        graph=graph,
        path=path,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        backend=backend,
        backend_version=version,
        targets=targets if backend == "tensorrt-rtx" else (),
        device=None if backend == "tensorrt-rtx" else DeviceEntry(name="a card", capability=targets[0]),
        precision=entry.precision,
        profiles=tuple(profiles),
        sources=tuple(PlanSource(path=f.path, fingerprint=f.fingerprint, sha256=f.sha256) for f in entry.files),
        refittable=refittable,
        seconds=1.0,
        peak_rss=1,
    )
    stages = {**bundle.manifest.stages, stage: entry.model_copy(update={"plans": (*entry.plans, plan)})}
    manifest = bundle.manifest.model_copy(update={"stages": stages})
    (bundle.root / "cascade.json").write_text(to_text(manifest))
    return open_bundle(bundle.root)


def without_plans(source: Path, target: Path) -> Bundle:
    """A copy of the bundle at `source`."""
    import shutil

    shutil.copytree(source, target)
    return open_bundle(target)
