"""The spellings of the dtypes that weights can be written in."""

from collections.abc import Mapping

from .errors import UsageError

# The spelling of options -> the spelling of safetensors; None keeps the dtype of the source.
DTYPES: Mapping[str, str | None] = {"keep": None, "fp32": "F32", "bf16": "BF16", "fp16": "F16"}


def parse_dtype(dtype: str | None) -> str | None:
    """Return the safetensors spelling of `dtype`, given as "bf16" or "BF16"; None for "keep" and None.

    Raises UsageError for any other text."""
    if dtype is None or dtype in DTYPES.values():
        return dtype
    if dtype.lower() not in DTYPES:
        raise UsageError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
    return DTYPES[dtype.lower()]
