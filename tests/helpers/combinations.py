"""Cases of tests that compare networks of several configs, at several sizes, in several dtypes."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest


def combinations(configs: Mapping[str, Any], sizes: Mapping[str, Any], dtypes: Sequence[Any]) -> list[Any]:
    """Every config, size and dtype, as parameters. The marker `slow` has all but the following.

    Every size in the first dtype, and every other dtype at the first size: what goes wrong with a size does not hang
    together with the dtype."""
    first_size, first_dtype = next(iter(sizes)), dtypes[0]
    return [
        pytest.param(
            config,
            size,
            dtype,
            id=f"{name}-{size_name}-{dtype}",
            marks=() if size_name == first_size or dtype is first_dtype else pytest.mark.slow,
        )
        for name, config in configs.items()
        for size_name, size in sizes.items()
        for dtype in dtypes
    ]
