"""Watches the memory of the first GPU, as NVIDIA's management library tells it. No package is needed."""

import ctypes
import threading
from collections.abc import Callable
from typing import Self

LIBRARY = "libnvidia-ml.so.1"
SECONDS_BETWEEN = 0.01


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class GpuMemory:
    """The most memory that all processes take on the first GPU while the block runs, beyond what they had before.

    It has CUDA's context, every allocator's blocks, and what libraries take for themselves."""

    def __init__(self) -> None:
        self.megabytes: int | None = None  # known after the block; None where there is no GPU
        self._over = threading.Event()

    def __enter__(self) -> Self:
        self._used = _reader()
        self._most = self._before = self._used() if self._used else 0
        if self._used:
            self._thread = threading.Thread(target=self._watch)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._used:
            self._thread.join()
            self._most = max(self._most, self._used())
            self.megabytes = (self._most - self._before) >> 20

    def _watch(self) -> None:
        while self._used and not self._over.wait(SECONDS_BETWEEN):
            self._most = max(self._most, self._used())


def _reader() -> Callable[[], int] | None:
    """A function that returns the bytes in use; None without the library or a GPU."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        return None
    device, memory = ctypes.c_void_p(), _Memory()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)):
        return None

    def used() -> int:
        return int(memory.used) if library.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) == 0 else 0

    return used if used() else None
