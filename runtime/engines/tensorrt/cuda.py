"""The few calls to CUDA that the TensorRT engines make.

No other module of cascadekit calls CUDA, except that `nvidia_driver` asks which GPU there is."""

import contextlib
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from ....schemas.errors import EngineError, reraise_interrupt

OUT_OF_MEMORY = "cudaErrorMemoryAllocation"
NO_DRIVER = ("cudaErrorInsufficientDriver", "cudaErrorNoDevice", "cudaErrorInitializationError", "cudaErrorStubLibrary")


class DeviceMemoryError(EngineError):
    """The GPU has too little free memory for a request."""


@dataclass(frozen=True)
class Device:
    """A GPU: its name, its compute capability as in "sm89", its memory in bytes."""

    name: str
    capability: str
    memory: int


class Cuda:
    """CUDA's runtime on the first device there is (CUDA_VISIBLE_DEVICES chooses), through cuda-bindings.

    Addresses are of device memory; streams and graphs are opaque; TensorRT takes int(stream). A call that fails raises
    EngineError with CUDA's message, or DeviceMemoryError when memory is short."""

    def __init__(self) -> None:
        """Raises EngineError, which names what is missing: cuda-bindings, a driver or a GPU."""
        self._runtime = import_cuda_runtime()
        self._call("cudaGetDeviceCount")

    def device(self) -> Device:
        properties = self._call("cudaGetDeviceProperties", 0)
        name = properties.name.decode(errors="replace").rstrip("\0")
        return Device(name, f"sm{properties.major}{properties.minor}", int(properties.totalGlobalMem))

    def driver_version(self) -> str:
        """The newest CUDA that the driver can run, as in "13.0"."""
        return cuda_version(int(self._call("cudaDriverGetVersion")))

    def free_memory(self) -> int:
        """Bytes of GPU memory that no process uses."""
        free, _total = self._call("cudaMemGetInfo")
        return int(free)

    def malloc(self, nbytes: int) -> int:
        return int(self._call("cudaMalloc", nbytes))

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def upload(self, address: int, array: NDArray[Any], stream: Any) -> None:
        """Copy a C-contiguous array to the device; it has to live until the stream is synchronised."""
        copied = (address, array.ctypes.data, array.nbytes, self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice)
        self._call("cudaMemcpyAsync", *copied, stream)

    def download(self, array: NDArray[Any], address: int, stream: Any) -> None:
        """Fill a C-contiguous array from the device; its content is there once the stream is synchronised."""
        copied = (array.ctypes.data, address, array.nbytes, self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost)
        self._call("cudaMemcpyAsync", *copied, stream)

    def create_stream(self) -> Any:
        """A stream that does not wait for the default one, on which TensorRT would synchronise with everything."""
        return self._call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)

    def destroy_stream(self, stream: Any) -> None:
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: Any) -> None:
        """Wait for everything that was put on the stream."""
        self._call("cudaStreamSynchronize", stream)

    def begin_capture(self, stream: Any) -> None:
        """From here on the stream records instead of running; this thread must not allocate until `end_capture`."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: Any) -> Any:
        """End the recording and return it as a graph that `launch` takes."""
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: Any, stream: Any) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        self._call("cudaGraphExecDestroy", graph)

    def _call(self, name: str, *args: Any) -> Any:
        """Call a function of CUDA and return its values without the status: one value alone, or else a tuple."""
        status, *values = getattr(self._runtime, name)(*args)
        if int(status) != 0:
            raise self._error(name, status)
        return values[0] if len(values) == 1 else tuple(values)

    def _error(self, call: str, status: Any) -> EngineError:
        _, text = self._runtime.cudaGetErrorString(status)
        reason = f"{status.name}: {text.decode(errors='replace')}"
        if status.name in NO_DRIVER:
            return EngineError(f"no NVIDIA GPU can be used here: {self._driver_problem() or reason}")
        kind = DeviceMemoryError if status.name == OUT_OF_MEMORY else EngineError
        return kind(f"{call} failed: {reason}")

    def _driver_problem(self) -> str | None:
        """The reason why the driver does not work; None if unknown."""
        driver = int(self._runtime.cudaDriverGetVersion()[1])
        needed = int(self._runtime.cudaRuntimeGetVersion()[1]) // 1000
        if driver == 0:
            return "there is no NVIDIA driver"
        if driver // 1000 < needed:
            return (
                f"its driver runs CUDA {cuda_version(driver)}, cuda-bindings are for {needed}; update the driver, or "
                f"pip install 'cuda-bindings=={driver // 1000}.*'"
            )
        return None


class DeviceBuffer:
    """Device memory that is reused, and replaced by a larger block when it is too small."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.address = 0
        self.nbytes = 0

    def fit(self, nbytes: int) -> int:
        """The address of at least `nbytes` bytes. If the block has to grow, its content is lost."""
        if nbytes > self.nbytes:
            self.free()
            self.address = self._cuda.malloc(nbytes)
            self.nbytes = nbytes
        return self.address

    def free(self) -> None:
        if self.nbytes:
            address, self.address, self.nbytes = self.address, 0, 0
            self._cuda.free(address)

    def __del__(self) -> None:
        with contextlib.suppress(EngineError):  # at the end of the process the driver may be gone
            self.free()


def cuda_version(number: int) -> str:
    """CUDA's 13050 as "13.5"."""
    return f"{number // 1000}.{number % 1000 // 10}"


def import_cuda_runtime() -> Any:
    """cuda.bindings.runtime. Raises EngineError, which says what to install, without it."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        reraise_interrupt(error)
        raise EngineError("cuda-bindings is not installed: pip install 'cuda-bindings>=12.8'") from error
    return runtime
