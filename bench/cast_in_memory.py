"""Measures casts in memory, without a file: the lower bound of a conversion that casts."""

from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import numpy as np

from ..storage.cast import Array

MEMORY_SPAN = 1 << 27  # bytes that each thread casts repeatedly: more than any cache
CHUNK = 1 << 16


def main(dtype: str, nbytes: int) -> None:
    """Print the seconds that casting `nbytes` of `dtype` takes, without a file and without checks."""
    print(cast_in_memory(dtype, nbytes))


def cast_in_memory(dtype: str, nbytes: int, threads: int = 2) -> float:
    """Seconds that `threads` threads of numpy take to cast `nbytes` of F32 to BF16, or of BF16 to F32.

    A thread holds at most MEMORY_SPAN bytes, and casts them several times for a larger amount."""
    size, wide = (4, 2) if dtype == "F32" else (2, 4)
    count = nbytes // size // threads
    held = max(1, min(count, MEMORY_SPAN // size))
    random = np.random.Generator(np.random.SFC64(0))
    sources = [random.integers(0, 1 << 8 * size - 2, held, f"u{size}") for _ in range(threads)]
    targets = [np.ones(held, f"u{wide}") for _ in range(threads)]
    start = perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(_cast_repeatedly, sources, targets, [count] * threads))
    return perf_counter() - start


def _cast_repeatedly(values: Array, out: Array, count: int) -> None:
    cast = _narrow if values.itemsize > out.itemsize else _widen
    while count > 0:
        for start in range(0, min(count, len(values)), CHUNK):
            cast(values[start : start + CHUNK], out[start : start + CHUNK])
        count -= len(values)


def _narrow(bits: Array, out: Array) -> None:
    """F32 to BF16, to nearest, ties to even; without NaN."""
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    out[:] = rounded


def _widen(bits: Array, out: Array) -> None:
    out[:] = bits
    out <<= 16
