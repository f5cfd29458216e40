"""Unpacks codes of 1 to 8 bits, and looks up what each code is worth before it is scaled."""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.block_types import SCALED_TYPES
from ..schemas.code_types import packing_of, values_of

Codes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def code_values(data: Codes, dtype: str) -> Floats:
    """Return the float32 value of each code in whole groups of bytes."""
    return np.asarray(_values(dtype)[_unpacked(data, dtype)], np.float32)


@cache
def _values(dtype: str) -> Floats:
    return np.array(values_of(dtype), np.float32)


def _unpacked(data: Codes, dtype: str) -> Codes:
    kind, packing = SCALED_TYPES[dtype], packing_of(dtype)
    if kind.nbytes == kind.values:
        return data
    groups = data.reshape(-1, kind.nbytes)
    codes: NDArray[Any] = np.zeros((len(groups), kind.values), np.uint8)
    for code, pieces in enumerate(packing):
        for byte, first, bits, place in pieces:
            codes[:, code] |= (groups[:, byte] >> first & (1 << bits) - 1) << place
    return codes.reshape(-1)
