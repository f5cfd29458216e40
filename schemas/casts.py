"""Decides which dtypes a tensor can be cast to."""

from .block_types import QUANTISED, WRITTEN
from .dtypes import FLOATS, FP8
from .errors import UsageError


def target_dtype(source: str, wanted: str | None) -> str:
    """The dtype in which a tensor of dtype `source` is written if the user asks for `wanted`.

    Floats become `wanted`; integers and booleans keep their dtype, and so does every tensor if `wanted` is None.
    Raises UsageError when `wanted` is not one of FLOATS."""
    if wanted is None:
        return source
    if wanted not in FLOATS:
        raise UsageError(f"dtype={wanted!r}: expected one of {', '.join(FLOATS)}")
    return wanted if source.startswith(("F", "BF")) or source in QUANTISED else source


def castable(source: str, target: str) -> bool:
    """True when `storage.cast` can cast from `source` to `target`."""
    return source in (*FLOATS, *FP8, *QUANTISED) and target in (*FLOATS, *WRITTEN)
