"""A plan on the device: TensorRT's engine and context, a buffer for every port, and a captured CUDA graph."""

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ....schemas.errors import EngineError
from ....schemas.manifest import GraphEntry
from ....schemas.plan_entries import PlanEntry
from ..protocol import Outputs, Tensors
from .cuda import Cuda, DeviceBuffer, DeviceMemoryError
from .host import Host
from .plan_ports import PlanPorts


@dataclass(frozen=True)
class Placed:
    """A tensor on the device."""

    shape: tuple[int, ...]
    address: int


class Execution:
    """One deserialised plan. `run` computes, `close` frees all of its device memory.

    TensorRT-RTX captures CUDA graphs itself. For TensorRT, a run with the shapes and addresses of the previous run is
    captured here, unless weights are streamed. TensorRT-RTX compiles kernels when they are first needed; the file
    `cache` keeps them for the next process."""

    def __init__(
        self, host: Host, runtime: Any, path: Path, *, plan: PlanEntry, graph: GraphEntry, cache: Path | None = None
    ) -> None:
        """Raises EngineError when TensorRT refuses the plan, or the plan does not belong to `graph`."""
        self.plan = plan
        self.host = host
        self._cuda: Cuda = host.cuda
        self._path = path
        self._cache = cache
        self.engine = _deserialize(host, runtime, path)
        self._context: Any = None
        self._config: Any = None
        self._runtime_cache: Any = None
        self.profile: int | None = None  # the profile whose scratch memory is allocated
        self._ports = PlanPorts(self.engine, path, plan, graph)
        self._stream = self._cuda.create_stream()
        self._buffers = {name: DeviceBuffer(self._cuda) for name in self._ports.types}
        self._held: WeakKeyDictionary[object, dict[str, DeviceBuffer]] = WeakKeyDictionary()
        self._last: Mapping[str, Placed] | None = None
        self._captured: Any = None
        self._captures = not hasattr(host.trt, "CudaGraphStrategy")

    @property
    def streamable(self) -> int:
        """Bytes of weights that may stay on the host until needed; 0 unless the plan was built for streaming."""
        return int(self.engine.streamable_weights_size)

    def keep_weights(self, nbytes: int) -> None:
        """Keep `nbytes` of the streamable weights on the device. To be called before the first run."""
        self.engine.weight_streaming_budget_v2 = nbytes
        self._captures = self._captures and nbytes >= self.streamable

    @property
    def replays(self) -> bool | None:
        """True if runs replay a CUDA graph that was captured here; None where TensorRT-RTX captures graphs."""
        return None if hasattr(self.host.trt, "CudaGraphStrategy") else self._captured is not None

    @property
    def weights_on_device(self) -> int:
        """An upper bound: the size of the plan, which holds little else, less the streamed weights."""
        streamable = self.streamable
        away = streamable - int(self.engine.weight_streaming_budget_v2) if streamable else 0
        return self.plan.bytes - away

    def scratch(self, profile: int) -> int:
        """Bytes of device memory that a run with `profile` takes for values between layers."""
        return int(self.engine.get_device_memory_size_for_profile_v2(profile))

    @property
    def device_bytes(self) -> int:
        ports = sum(buffer.nbytes for buffer in self._all_buffers())
        return self.weights_on_device + ports + (0 if self.profile is None else self.scratch(self.profile))

    def run(self, profile: int, inputs: Tensors, constants: Tensors, owner: object) -> Outputs:
        """The outputs for `inputs` and `constants`. The constants of an owner are the same in every call: they stay on
        the device for as long as `owner` lives.

        Raises EngineError when CUDA or TensorRT fail."""
        try:
            return self._run(profile, inputs, constants, owner)
        except EngineError:
            self._drop_capture()
            self._last = None  # the context may have taken some of the addresses
            raise

    def _run(self, profile: int, inputs: Tensors, constants: Tensors, owner: object) -> Outputs:
        if owner not in self._held:
            buffers = {name: DeviceBuffer(self._cuda) for name in constants}
            arrays = self._upload(constants, buffers)
            self._cuda.synchronize(self._stream)
            self._held[owner] = buffers
        self._select(profile)
        placed = {name: Placed(array.shape, self._held[owner][name].address) for name, array in constants.items()}
        arrays = self._upload(inputs, self._buffers)
        placed |= {name: Placed(array.shape, self._buffers[name].address) for name, array in arrays.items()}
        outputs = self._place(placed)
        self._launch({**placed, **outputs})
        results = {name: np.empty(spot.shape, self._ports.host_type(name)) for name, spot in outputs.items()}
        for name, spot in outputs.items():
            self._cuda.download(results[name], spot.address, self._stream)
        self._cuda.synchronize(self._stream)
        return {name: self._ports.from_plan(name, result) for name, result in results.items()}

    def close(self) -> None:
        if self.engine is None:
            return
        self._drop_capture()
        self._save_cache()
        # In this order: each depends on the next.
        self._context = self._config = self._runtime_cache = self.engine = None
        for buffer in self._all_buffers():
            buffer.free()
        self._cuda.destroy_stream(self._stream)

    def _all_buffers(self) -> Iterator[DeviceBuffer]:
        for buffers in (self._buffers, *self._held.values()):
            yield from buffers.values()

    def _upload(self, inputs: Tensors, buffers: Mapping[str, DeviceBuffer]) -> Tensors:
        """Begin to copy `inputs` into `buffers`. The returned arrays have to live until the stream is synchronised."""
        arrays = {name: self._ports.to_plan(name, array) for name, array in inputs.items()}
        for name, array in arrays.items():
            self._cuda.upload(buffers[name].fit(array.nbytes), array, self._stream)
        return arrays

    def _select(self, profile: int) -> None:
        if self._context is None:
            self._context = self._create_context()
        if profile == self.profile:
            return
        self._drop_capture()
        self._last = None
        if not self._context.set_optimization_profile_async(profile, int(self._stream)):
            raise self._failed("cannot take its profile")
        self._cuda.synchronize(self._stream)
        self.profile = profile

    def _create_context(self) -> Any:
        """A context whose scratch memory is that of the profile in use, not of the largest profile."""
        trt = self.host.trt
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE)
        if hasattr(trt, "CudaGraphStrategy"):
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if self._cache and hasattr(config, "create_runtime_cache"):
            self._runtime_cache = config.create_runtime_cache()
            if self._cache.is_file():
                self._runtime_cache.deserialize(self._cache.read_bytes())  # False for another GPU or version
            config.set_runtime_cache(self._runtime_cache)
        context = self.engine.create_execution_context(config)
        self._config = config
        if context is None:
            raise self._failed("cannot prepare to run")
        return context

    def _place(self, inputs: Mapping[str, Placed]) -> dict[str, Placed]:
        """Set the addresses of inputs and outputs in the context, and return where the outputs are."""
        context = self._context
        if self._last is None or any(self._last[name].shape != spot.shape for name, spot in inputs.items()):
            for name, spot in inputs.items():
                if not context.set_input_shape(name, spot.shape):
                    raise self._failed(f"does not take {name} {list(spot.shape)}")
            unknown = context.infer_shapes()
            if unknown:
                raise self._failed(f"lacks shapes of {', '.join(unknown)}")
        outputs = {}
        for name in self._ports.outputs:
            shape = tuple(context.get_tensor_shape(name))
            if min(shape, default=0) < 0:
                raise self._failed(f"does not know the size of {name}, {list(shape)}")
            nbytes = int(np.prod(shape)) * self._ports.host_type(name).itemsize
            outputs[name] = Placed(shape, self._buffers[name].fit(nbytes))
        for name, spot in {**inputs, **outputs}.items():
            if self._last is None or self._last[name].address != spot.address:
                context.set_tensor_address(name, spot.address)
        return outputs

    def _launch(self, placed: Mapping[str, Placed]) -> None:
        repeated = placed == self._last
        if not repeated:
            self._drop_capture()
            self._last = placed
        elif self._captures and self._captured is None:
            self._captured = self._capture()
        if self._captured is not None:
            self._cuda.launch(self._captured, self._stream)
        else:
            self._enqueue()

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(int(self._stream)):
            raise self._failed("failed")

    def _capture(self) -> Any:
        """A run as a CUDA graph. Returns None, and stops further attempts, where the run cannot be captured."""
        try:
            self._cuda.begin_capture(self._stream)
            try:
                self._enqueue()
            finally:
                captured = self._cuda.end_capture(self._stream)
        except EngineError:
            self._captures = False
            return None
        return captured

    def _drop_capture(self) -> None:
        if self._captured is not None:
            captured, self._captured = self._captured, None
            self._cuda.destroy_graph(captured)

    def _save_cache(self) -> None:
        """Save the compiled kernels. Without the cache, the next start compiles them again and nothing fails."""
        if self._cache is None or self._runtime_cache is None or self.profile is None:
            return
        try:
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            partial = self._cache.with_name(f"{self._cache.name}.{id(self)}")
            partial.write_bytes(memoryview(self._runtime_cache.serialize()))
            partial.replace(self._cache)
        except OSError:
            return

    def _failed(self, what: str) -> EngineError:
        return _error(self.host, f"{self._path}: {self.plan.backend} {what}")


def _deserialize(host: Host, runtime: Any, path: Path) -> Any:
    """The engine of the plan at `path`, whose file is mapped into memory."""
    host.messages.clear()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise _error(host, f"{path}: {host.backend} cannot load it")
    return engine


def _error(host: Host, what: str) -> EngineError:
    """An error with TensorRT's reason: DeviceMemoryError if the reason is a lack of memory."""
    reason = host.reason
    host.messages.clear()
    lack = any(words in reason.lower() for words in ("out of memory", "cudaerror 2 ", "outofmemory"))
    return (DeviceMemoryError if lack else EngineError)(f"{what}: {reason}")
