"""The memory of processes on Linux: its size, and pages of the weights' file that a build gives back.

TensorRT maps the weights' file and reads all of it, some parts several times. The pages stay in the process until the
system needs the room: a second copy of the weights, which a container's limit counts.
"""

import ctypes
import mmap
import threading
from collections.abc import Iterator
from pathlib import Path
from time import sleep

MAPS = Path("/proc/self/maps")
INTERVAL = 0.03  # seconds; a page that is read again comes from the system's cache


def release_pages(folder: Path) -> None:
    """Start a thread that gives back the pages which this process reads of mapped files in `folder`.

    Does nothing on a system without madvise."""
    try:
        libc = ctypes.CDLL(None)
        libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    except (OSError, AttributeError):
        return
    if MAPS.is_file():
        threading.Thread(target=_keep_releasing, args=(libc, folder.resolve()), daemon=True).start()


def _keep_releasing(libc: ctypes.CDLL, folder: Path) -> None:
    while True:
        sleep(INTERVAL)
        for start, length in mappings(folder):
            libc.madvise(start, length, mmap.MADV_DONTNEED)


def mappings(folder: Path) -> Iterator[tuple[int, int]]:
    """Address and length of every read-only mapping of a file in `folder`.

    Pages of a writable mapping are not released, because the written data would be lost."""
    for line in MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, flags, *_, path = line.split(maxsplit=5)
        if "w" not in flags and Path(path).parent == folder:
            start, end = (int(address, 16) for address in addresses.split("-"))
            yield start, end - start
