"""Decides which dtypes a tensor can be cast to."""

from .block_types import QUANTISED, WRITTEN
from .dtypes import FLOATS, FP8


def target_dtype(source: str, wanted: str | None) -> str:
    """The dtype in which a tensor of dtype `source` is written if the user asks for `wanted`.

    Floats become `wanted`, one of FLOATS. Integers and booleans keep their dtype, and so does every tensor if `wanted`
    is None."""
    return wanted if wanted and (source.startswith(("F", "BF")) or source in QUANTISED) else source


def castable(source: str, target: str) -> bool:
    """True when `storage.cast` can cast from `source` to `target`."""
    return source in (*FLOATS, *FP8, *QUANTISED) and target in (*FLOATS, *WRITTEN)
