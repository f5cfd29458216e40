"""Keeps the weights' file out of the memory of the process that builds from it.

TensorRT maps the file and reads all of it, some parts several times. What was read stays with the process, a whole
copy of the weights beside those it makes, until the system needs the room; and in a container it counts.
"""

import ctypes
import mmap
import threading
from collections.abc import Iterator
from pathlib import Path
from time import sleep

MAPS = Path("/proc/self/maps")
INTERVAL = 0.03  # seconds; reading a page again takes it from the system's cache


def forget_pages(folder: Path) -> None:
    """From now on, give back what this process has read of files in `folder` through mappings. Does nothing where the
    system has no such call."""
    try:
        libc = ctypes.CDLL(None)
        libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    except (OSError, AttributeError):
        return
    if MAPS.is_file():
        threading.Thread(target=_keep_forgetting, args=(libc, folder.resolve()), daemon=True).start()


def _keep_forgetting(libc: ctypes.CDLL, folder: Path) -> None:
    while True:
        sleep(INTERVAL)
        for start, length in mappings(folder):
            libc.madvise(start, length, mmap.MADV_DONTNEED)


def mappings(folder: Path) -> Iterator[tuple[int, int]]:
    """Address and length of every mapping of a file in `folder` that cannot be written to: forgetting one that can
    would lose what was written."""
    for line in MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, flags, *_, path = line.split(maxsplit=5)
        if "w" not in flags and Path(path).parent == folder:
            start, end = (int(address, 16) for address in addresses.split("-"))
            yield start, end - start
