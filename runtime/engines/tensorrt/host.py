"""The host of TensorRT engines: a TensorRT module, CUDA, and the GPU."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from ....schemas.errors import EngineError, reraise_interrupt
from ....schemas.precision import Backend
from ....storage.install_hint import install_hint
from .cuda import Cuda, Device

MODULES: Mapping[Backend, str] = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
KEPT_MESSAGES = 20


@dataclass(frozen=True)
class Host:
    """A GPU and the TensorRT that runs on it, whose module is `trt`."""

    backend: Backend
    trt: Any
    cuda: Cuda
    device: Device

    @property
    def version(self) -> str:
        return str(self.trt.__version__)

    @property
    def messages(self) -> deque[str]:
        """The latest errors of this TensorRT."""
        messages: deque[str] = _logger(self.trt).messages
        return messages

    @property
    def reason(self) -> str:
        """The first of the latest errors, in one line: those after it are consequences."""
        return " ".join(self.messages[0].split()) if self.messages else "it gave no reason"


def open_host(backend: Backend) -> Host:
    """The first GPU. Raises EngineError, which names what is missing: TensorRT, CUDA's bindings, a driver or a GPU."""
    trt = import_tensorrt(backend)
    cuda = Cuda()
    return Host(backend, trt, cuda, cuda.device())


def import_tensorrt(backend: Backend) -> Any:
    """The module. Raises EngineError, which says what to install, when it is missing or cannot be loaded."""
    install = install_hint(backend)
    try:
        return import_module(MODULES[backend])
    except ModuleNotFoundError as error:
        reraise_interrupt(error)
        raise EngineError(f"{backend} is not installed: {install}") from error
    except (ImportError, OSError, RuntimeError) as error:  # one of its libraries is missing or of another machine
        reraise_interrupt(error)
        raise EngineError(f"{backend} is installed but cannot be loaded: {error}; {install}") from error


def make_runtime(host: Host) -> Any:
    """TensorRT's runtime, which turns plans into engines. Its logger fills `host.messages`."""
    return host.trt.Runtime(_logger(host.trt))


@cache
def _logger(trt: Any) -> Any:
    """The logger of this process: TensorRT ignores a second one while the first is alive."""

    class ErrorLogger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: deque[str] = deque(maxlen=KEPT_MESSAGES)

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.messages.append(text)

    return ErrorLogger()
