"""The installed TensorRT of any generation, and its log messages.

TensorRT 10, TensorRT 11 and TensorRT-RTX have different attributes. The code asks objects for an attribute, and never
compares versions.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...runtime.engines.tensorrt.host import MODULES, import_tensorrt
from ...schemas.errors import EngineError, UsageError
from ...storage.install_hint import install_hint

# Parts of messages that every call logs on a machine without a driver, even a call that needs none.
DRIVERLESS = ("cudaError 35", "CUDA driver version is insufficient", "Unable to determine GPU memory usage")


class Messages:
    """TensorRT's errors, without those about a missing driver."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def clear(self) -> None:
        self.errors.clear()

    def add(self, text: str) -> None:
        if not any(noise in text for noise in DRIVERLESS):
            self.errors.append(text)

    @property
    def reason(self) -> str:
        """The first error in one line, without its place in TensorRT's source. Later errors are its consequences."""
        return re.sub(r"^\w+\.cpp:\d+: ", "", " ".join(self.errors[0].split())) if self.errors else "it gave no reason"


@dataclass(frozen=True)
class InstalledTensorRT:
    """An installed TensorRT: its name in `MODULES`, and its Python module."""

    name: str
    module: Any

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    @cached_property
    def builds_for_others(self) -> bool:
        """True for a TensorRT that compiles for GPUs by name, and needs no GPU."""
        return hasattr(self.module, "ComputeCapability")

    def flag(self, name: str) -> Any | None:
        """The builder flag `name`; None when this TensorRT has no such flag."""
        return getattr(self.module.BuilderFlag, name, None)

    def network_flags(self) -> int:
        """Flags for a strongly typed network, which keeps the types of the graph. Only TensorRT 10 needs a flag."""
        strong = getattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return 0 if strong is None else 1 << int(strong)


MESSAGES = Messages()
_loggers: dict[str, Any] = {}


def find_backend(name: str) -> InstalledTensorRT:
    """The backend called "tensorrt-rtx" or "tensorrt".

    Raises UsageError for another name, EngineError when the backend is not installed or cannot be loaded."""
    known = next((backend for backend in MODULES if backend == name), None)
    if known is None:
        raise UsageError(f"backend={name!r}: expected {' or '.join(MODULES)}")
    module = import_tensorrt(known)
    if not hasattr(module, "OnnxParser"):
        version = getattr(module, "__version__", "")
        raise EngineError(f"{name} {version}: has no ONNX parser; {install_hint(known)}")
    return InstalledTensorRT(name, module)


def logger_of(backend: InstalledTensorRT) -> Any:
    """The logger of this process, which fills MESSAGES. TensorRT ignores a second logger while one exists."""
    if backend.name not in _loggers:
        base: Any = backend.module.ILogger

        class Logger(base):  # type: ignore[misc]
            def log(self, severity: Any, text: str) -> None:
                if severity <= base.ERROR:
                    MESSAGES.add(text)

        _loggers[backend.name] = Logger()
    return _loggers[backend.name]
