"""Return free memory to the operating system."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

M_MMAP_THRESHOLD = -3  # parameter of glibc's mallopt(3): the size from which freed blocks are returned to the system
WHILE_LOADING = 1 << 20
USUALLY = 32 << 20  # where glibc itself ends up once blocks of that size were freed


@contextmanager
def large_blocks_given_back() -> Iterator[None]:
    """Have glibc return every freed block of 1 MiB or more at once, for as long as the context lasts.

    Loading a stage casts and rearranges its weights one by one. glibc would keep freed blocks below 32 MiB. They are
    up to a fifth of all weights at the peak. Loading takes half as long again, as every block comes from the system."""
    _set_threshold(WHILE_LOADING)
    try:
        yield
    finally:
        _set_threshold(USUALLY)


def give_back_memory() -> None:
    """Have the C library return its free memory.

    Loading a large stage casts and rearranges its weights, and glibc keeps a tenth of their size for later. Closed
    stages are in no reference cycle, so Python has freed them already. Collecting garbage here would take half a
    second beside torch, for each stage."""
    if library := _glibc():
        library.malloc_trim(0)


def _set_threshold(nbytes: int) -> None:
    if library := _glibc():
        library.mallopt(M_MMAP_THRESHOLD, nbytes)


def _glibc() -> ctypes.CDLL | None:
    """The C library if it is glibc, else None; other libraries lack these calls."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "malloc_trim") else None
