"""Asks the NVIDIA driver for its first GPU. No package is needed: the driver's own library answers."""

import ctypes
import sys
from dataclasses import dataclass

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
NAME_BYTES = 256
MAJOR, MINOR = 75, 76  # attributes, as cuda.h numbers them


@dataclass(frozen=True)
class DriverGpu:
    """A GPU: its name, its memory in bytes, and its compute capability, such as "sm89"."""

    name: str
    memory: int
    capability: str


def first_gpu() -> DriverGpu | str:
    """The first GPU that the driver offers, or why there is none."""
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError:
        return "there is no NVIDIA driver"
    device, memory, major, minor = ctypes.c_int(), ctypes.c_size_t(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(NAME_BYTES)
    for call, arguments in (
        ("cuInit", (0,)),
        ("cuDeviceGet", (ctypes.byref(device), 0)),
        ("cuDeviceGetName", (name, NAME_BYTES, device)),
        ("cuDeviceTotalMem_v2", (ctypes.byref(memory), device)),
        ("cuDeviceGetAttribute", (ctypes.byref(major), MAJOR, device)),
        ("cuDeviceGetAttribute", (ctypes.byref(minor), MINOR, device)),
    ):
        status = getattr(driver, call)(*arguments)
        if status:
            return f"the NVIDIA driver offers no GPU ({call} failed with {status})"
    return DriverGpu(name.value.decode(errors="replace"), memory.value, f"sm{major.value}{minor.value}")
