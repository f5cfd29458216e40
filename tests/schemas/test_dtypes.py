"""The one table of dtypes against numpy and its own parts."""

import numpy as np
import pytest

from cascadekit.schemas.dtypes import DTYPE_SIZES, DTYPES, FLOATS, FP8, INTEGERS, parse_dtype
from cascadekit.schemas.errors import UsageError


def test_sizes_are_those_of_the_numpy_types() -> None:
    assert {name: np.dtype(DTYPES[name].numpy).itemsize for name in DTYPE_SIZES} == DTYPE_SIZES
    assert {*FLOATS, *FP8, *INTEGERS} == DTYPE_SIZES.keys()
    assert all(DTYPES[name].torch for name in DTYPE_SIZES)


def test_the_order_is_that_of_the_library() -> None:
    """Ascending in size."""
    sizes = list(DTYPE_SIZES.values())
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("given", "dtype"), [("bf16", "BF16"), ("FP32", "F32"), ("F16", "F16"), ("keep", None), (None, None)]
)
def test_spellings(given: str | None, dtype: str | None) -> None:
    assert parse_dtype(given) == dtype


def test_other_names() -> None:
    with pytest.raises(UsageError, match="dtype='int8': expected one of keep, fp32, bf16, fp16"):
        parse_dtype("int8")
