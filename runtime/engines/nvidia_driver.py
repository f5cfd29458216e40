"""Asks the NVIDIA driver for its first GPU. No package is needed: the driver's own library answers."""

import ctypes
import sys
from dataclasses import dataclass

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
NAME_BYTES = 256


@dataclass(frozen=True)
class DriverGpu:
    """A GPU: its name, and its memory in bytes."""

    name: str
    memory: int


def first_gpu() -> DriverGpu | str:
    """The first GPU that the driver offers, or why there is none."""
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError:
        return "there is no NVIDIA driver"
    device, memory = ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(NAME_BYTES)
    for call, arguments in (
        ("cuInit", (0,)),
        ("cuDeviceGet", (ctypes.byref(device), 0)),
        ("cuDeviceGetName", (name, NAME_BYTES, device)),
        ("cuDeviceTotalMem_v2", (ctypes.byref(memory), device)),
    ):
        status = getattr(driver, call)(*arguments)
        if status:
            return f"the NVIDIA driver offers no GPU ({call} failed with {status})"
    return DriverGpu(name.value.decode(errors="replace"), memory.value)
