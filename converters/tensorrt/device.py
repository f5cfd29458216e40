"""The GPU of this machine, found through its driver; no CUDA toolkit is needed."""

import ctypes
from typing import Any

from ...schemas.errors import EngineError
from ...schemas.plan_entries import DeviceEntry

# Attribute numbers of cuda.h, which do not change.
MAJOR, MINOR = 75, 76
NAME_BYTES = 256
DRIVERS = ("libcuda.so.1", "libcuda.so", "nvcuda.dll")
NO_GPU = 'TensorRT builds for the GPU of the machine it runs on, and {}; backend="tensorrt-rtx" builds without a GPU'


def present_device() -> DeviceEntry:
    """The first GPU that CUDA finds. Raises EngineError when there is none, with the advice to use tensorrt-rtx."""
    driver = _driver()
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        raise EngineError(NO_GPU.format("the driver finds none"))
    handle, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(NAME_BYTES)
    driver.cuDeviceGet(ctypes.byref(handle), 0)
    driver.cuDeviceGetName(name, NAME_BYTES, handle)
    driver.cuDeviceGetAttribute(ctypes.byref(major), MAJOR, handle)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), MINOR, handle)
    return DeviceEntry(name=name.value.decode(errors="replace"), capability=f"sm{major.value}{minor.value}")


def _driver() -> Any:
    for name in DRIVERS:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise EngineError(NO_GPU.format("there is no NVIDIA driver here"))
