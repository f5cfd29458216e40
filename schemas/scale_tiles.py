"""The tiles in which cuBLAS keeps the factors of mxfp8 and nvfp4."""

import math

TILE = (128, 4)  # rows and columns


def tiled_size(rows: int, columns: int) -> int:
    """Return how many factors are stored for `rows` of `columns` factors each, in whole tiles."""
    return math.prod(-(-size // step) * step for size, step in zip((rows, columns), TILE, strict=True))
