"""Types of quantised codes whose factors are in other tensors: how codes are packed into bytes, and what each is worth.

| names | written by | codes |
|---|---|---|
| INT8, FP4 | ComfyUI, torchao, bitsandbytes, SDNQ | bytes; two E2M1 numbers in a byte |
| UINT1 to UINT8, INT2 to INT7, FLOAT2_E1M0FN and others | SDNQ | 1 to 8 bits, packed over the whole tensor |
| NF4, FP4_BNB | bitsandbytes | two in a byte |
"""

import re
from collections.abc import Mapping
from functools import cache
from math import ldexp
from typing import NamedTuple

LARGEST = 8  # bits of a code


class Piece(NamedTuple):
    """Some bits of a code: they begin at bit `first` of a byte, and at bit `place` of the code."""

    byte: int
    first: int
    bits: int
    place: int


Packing = tuple[tuple[Piece, ...], ...]  # the pieces of each code in a group of bytes


def _even(bits: int) -> Packing:
    """Codes that divide a byte; the first has its lowest bits."""
    return tuple((Piece(0, first, bits, 0),) for first in range(0, 8, bits))


def _lower(count: int, bits: int) -> Packing:
    """Codes in the lowest bits of one byte each."""
    return tuple((Piece(byte, 0, bits, 0),) for byte in range(count))


# SDNQ's packings: most codes have a byte each, and the others are made of the bits that these leave.
PACKINGS: Mapping[int, Packing] = {
    1: _even(1),
    2: _even(2),
    3: (
        *_lower(3, 3),
        *(((Piece(byte, 3, 3, 0),)) for byte in range(3)),
        (Piece(0, 6, 2, 0), Piece(2, 6, 1, 2)),
        (Piece(1, 6, 2, 0), Piece(2, 7, 1, 2)),
    ),
    4: _even(4),
    5: (
        *_lower(5, 5),
        (Piece(0, 5, 3, 0), Piece(3, 5, 2, 3)),
        (Piece(1, 5, 3, 0), Piece(4, 5, 2, 3)),
        (Piece(2, 5, 3, 0), Piece(4, 7, 1, 3), Piece(3, 7, 1, 4)),
    ),
    6: (*_lower(3, 6), (Piece(0, 6, 2, 4), Piece(1, 6, 2, 2), Piece(2, 6, 2, 0))),
    7: (*_lower(7, 7), tuple(Piece(byte, 7, 1, 6 - byte) for byte in range(7))),
    8: _lower(1, 8),
}
UPPER_FIRST: Packing = tuple(reversed(PACKINGS[4]))  # of ComfyUI and bitsandbytes

_FLOAT = re.compile(r"FLOAT(\d)_E(\d)M(\d)FN(U?)(?:_SDNQ)?")
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _float_names() -> list[str]:
    """SDNQ's floats of up to 8 bits, signed (FN) and unsigned (FNU), by their bits of exponent and mantissa."""
    names = []
    for bits in range(1, LARGEST + 1):
        for unsigned in (0, 1):
            for exponent in range(1, min(5, bits - 1 + unsigned) + 1):
                name = f"FLOAT{bits}_E{exponent}M{bits - 1 + unsigned - exponent}FN{'U' * unsigned}"
                names.append(f"{name}_SDNQ" if name == "FLOAT8_E4M3FN" else name)
    return names


# The values of bitsandbytes' types. Its files have these tables too, but its kernels do not read them.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = tuple(twelfths / 12 for twelfths in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
TABLES: Mapping[str, tuple[float, ...]] = {
    "FP4": (*_E2M1, *(-value for value in _E2M1)),
    "FP4_BNB": (*_FP4, *(-value for value in _FP4)),
    "NF4": _NF4,
}
NAMES = (
    *(f"UINT{bits}" for bits in range(1, LARGEST + 1)),
    *(f"INT{bits}" for bits in range(2, LARGEST + 1)),
    *_float_names(),
    *TABLES,
)


def packing_of(name: str) -> Packing:
    """Return how the codes of a type lie in a group of bytes."""
    return UPPER_FIRST if name in TABLES else PACKINGS[bits_of(name)]


def bits_of(name: str) -> int:
    """Return the bits of a code."""
    return 4 if name in TABLES else int("".join(filter(str.isdigit, name.partition("_")[0])))


@cache
def values_of(name: str) -> tuple[float, ...]:
    """Return the value of each code."""
    codes = range(2 ** bits_of(name))
    if name in TABLES:
        return TABLES[name]
    if name == "INT8":  # stored as two's complements; all others begin with the code of the least value
        return tuple(float(code - 256 * (code > 127)) for code in codes)
    if match := _FLOAT.fullmatch(name):
        bits, exponent, mantissa = map(int, match.groups()[:3])
        return tuple(_float_value(code, bits, exponent, mantissa, signed=not match[4]) for code in codes)
    least = 0 if name.startswith("UINT") else -len(codes) // 2
    return tuple(float(code + least) for code in codes)


def _float_value(code: int, bits: int, exponent: int, mantissa: int, *, signed: bool) -> float:
    """The value of a float without infinities, NaN and negative zero. The bias is that of IEEE 754; numbers may be
    subnormal."""
    sign = -1.0 if signed and code >> (bits - 1) else 1.0
    power = (code >> mantissa) & (2**exponent - 1)
    fraction = (code & (2**mantissa - 1)) / 2**mantissa
    bias = 2 ** (exponent - 1) - 1
    size = ldexp(fraction, 1 - bias) if power == 0 else ldexp(1 + fraction, power - bias)
    return sign * size if size else 0.0
