"""Memory that nobody uses any more, given back to the system."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

M_MMAP_THRESHOLD = -3  # of glibc's mallopt(3): blocks from this size on go back to the system when they are freed
WHILE_LOADING = 1 << 20
USUALLY = 32 << 20  # where glibc itself ends up once blocks of that size were freed


@contextmanager
def large_blocks_given_back() -> Iterator[None]:
    """For the time of loading a stage, which casts and rearranges weights one by one: what that frees goes back to the
    system at once. glibc would keep blocks below 32 MiB for later, up to a fifth of all weights at the peak. Loading
    takes half as long again, as all memory comes fresh from the system."""
    _set_threshold(WHILE_LOADING)
    try:
        yield
    finally:
        _set_threshold(USUALLY)


def give_back_memory() -> None:
    """Collect garbage and have the C library return what is free.

    Loading a large stage casts and rearranges its weights, and glibc keeps a tenth of their size for later."""
    gc.collect()
    if library := _glibc():
        library.malloc_trim(0)


def _set_threshold(nbytes: int) -> None:
    if library := _glibc():
        library.mallopt(M_MMAP_THRESHOLD, nbytes)


def _glibc() -> ctypes.CDLL | None:
    """The C library where it is glibc, which alone has these calls."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "malloc_trim") else None
