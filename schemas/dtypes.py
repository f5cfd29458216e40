"""The dtypes of tensors by the names that safetensors gives them, and the spellings that options take."""

from collections.abc import Mapping
from typing import NamedTuple

from .errors import UsageError


class Dtype(NamedTuple):
    """A dtype: the bits of one value, torch's name, and the numpy type that holds a value.

    numpy has neither BF16 nor fp8, whose bits are held as integers. Only dtypes with a numpy type are read."""

    bits: int
    torch: str = ""
    numpy: str = ""


# In the ascending order of the safetensors library's own enumeration, which decides where its writer puts a tensor
# (see `storage.safetensors_plan.canonical_order`).
DTYPES: Mapping[str, Dtype] = {
    "BOOL": Dtype(8, "bool", "<u1"),
    "F4": Dtype(4),
    "F6_E2M3": Dtype(6),
    "F6_E3M2": Dtype(6),
    "U8": Dtype(8, "uint8", "<u1"),
    "I8": Dtype(8, "int8", "<i1"),
    "F8_E5M2": Dtype(8, "float8_e5m2", "<u1"),
    "F8_E4M3": Dtype(8, "float8_e4m3fn", "<u1"),
    "F8_E8M0": Dtype(8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": Dtype(8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": Dtype(8, "float8_e5m2fnuz"),
    "I16": Dtype(16, "int16", "<i2"),
    "U16": Dtype(16, "uint16", "<u2"),
    "F16": Dtype(16, "float16", "<f2"),
    "BF16": Dtype(16, "bfloat16", "<u2"),
    "I32": Dtype(32, "int32", "<i4"),
    "U32": Dtype(32, "uint32", "<u4"),
    "F32": Dtype(32, "float32", "<f4"),
    "C64": Dtype(64, "complex64"),
    "F64": Dtype(64, "float64", "<f8"),
    "I64": Dtype(64, "int64", "<i8"),
    "U64": Dtype(64, "uint64", "<u8"),
}
DTYPE_SIZES: Mapping[str, int] = {name: dtype.bits // 8 for name, dtype in DTYPES.items() if dtype.numpy}  # in bytes
FLOATS = ("F16", "BF16", "F32", "F64")
FP8 = ("F8_E4M3", "F8_E5M2")  # cast from, never to
INTEGERS: Mapping[str, str] = {name: DTYPES[name].numpy for name in DTYPE_SIZES if name not in (*FLOATS, *FP8)}

# The spelling of options -> the spelling of safetensors; None keeps the dtype of the source.
DTYPE_OPTIONS: Mapping[str, str | None] = {"keep": None, "fp32": "F32", "bf16": "BF16", "fp16": "F16"}


def parse_dtype(dtype: str | None) -> str | None:
    """Return the safetensors spelling of `dtype`, given as "bf16" or "BF16"; None for "keep" and None.

    Raises UsageError for any other text."""
    if dtype is None or dtype in DTYPE_OPTIONS.values():
        return dtype
    if dtype.lower() not in DTYPE_OPTIONS:
        raise UsageError(f"dtype={dtype!r}: expected one of {', '.join(DTYPE_OPTIONS)}")
    return DTYPE_OPTIONS[dtype.lower()]
