"""The types that GGUF files store tensors in: blocks of integers with scales, and plain numbers.

Names and numbers are those of ggml (gguf-py's GGMLQuantizationType, GGML_QUANT_SIZES and LlamaFileType)."""

from collections.abc import Mapping
from typing import NamedTuple

from .code_types import NAMES, bits_of, packing_of
from .dtypes import DTYPE_SIZES


class BlockType(NamedTuple):
    """A type of blocks along the rows of a tensor: `values` values of a row take `nbytes` bytes.

    `file_type` names a file that has mostly this type. A row that is no multiple of `values` is written in the
    `fallback`, as llama.cpp does; rows that fit no type stay float. `error` is the relative root mean square error of
    normally distributed values as this package writes them, None for a type that it only reads."""

    code: int
    values: int
    nbytes: int
    error: float | None = None
    file_type: int = 0
    fallback: str = ""

    @property
    def bits(self) -> float:
        """Bits of one value, with its share of the scales."""
        return 8 * self.nbytes / self.values


# The types that are read; those with an error are written too.
BLOCK_TYPES: Mapping[str, BlockType] = {
    "Q4_0": BlockType(2, 32, 18, 0.086, 2),
    "Q4_1": BlockType(3, 32, 20),
    "Q5_0": BlockType(6, 32, 22, 0.043, 8),
    "Q5_1": BlockType(7, 32, 24, 0.038, 9),
    "Q8_0": BlockType(8, 32, 34, 0.0054, 7),
    "Q2_K": BlockType(10, 256, 84),
    "Q3_K": BlockType(11, 256, 110),
    "Q4_K": BlockType(12, 256, 144, 0.072, 14, fallback="Q5_0"),
    "Q5_K": BlockType(13, 256, 176, 0.036, 16, fallback="Q5_1"),
    "Q6_K": BlockType(14, 256, 210, 0.017, 18, fallback="Q8_0"),
    "IQ4_NL": BlockType(20, 32, 18),
    "IQ4_XS": BlockType(23, 256, 136),
}
WRITTEN = tuple(name for name, kind in BLOCK_TYPES.items() if kind.error)

# Types whose files are recognised, but whose values are not read: number, values and bytes of a block.
UNREAD_TYPES: Mapping[str, BlockType] = {
    "Q8_1": BlockType(9, 32, 40),
    "Q8_K": BlockType(15, 256, 292),
    "IQ2_XXS": BlockType(16, 256, 66),
    "IQ2_XS": BlockType(17, 256, 74),
    "IQ3_XXS": BlockType(18, 256, 98),
    "IQ1_S": BlockType(19, 256, 50),
    "IQ3_S": BlockType(21, 256, 110),
    "IQ2_S": BlockType(22, 256, 82),
    "IQ1_M": BlockType(29, 256, 56),
    "TQ1_0": BlockType(34, 256, 54),
    "TQ2_0": BlockType(35, 256, 66),
    "MXFP4": BlockType(39, 32, 17),
    "NVFP4": BlockType(40, 64, 36),
    "Q1_0": BlockType(41, 128, 18),
}

# Plain numbers by the names that safetensors gives them.
PLAIN_TYPES: Mapping[str, int] = {
    "F32": 0,
    "F16": 1,
    "I8": 24,
    "I16": 25,
    "I32": 26,
    "I64": 27,
    "F64": 28,
    "BF16": 30,
}
FILE_TYPES: Mapping[str, int] = {"F32": 0, "F16": 1, "BF16": 32} | {
    name: BLOCK_TYPES[name].file_type for name in WRITTEN
}
GGML_TYPES: Mapping[int, tuple[str, BlockType]] = {
    kind.code: (name, kind)
    for name, kind in {
        **BLOCK_TYPES,
        **UNREAD_TYPES,
        **{name: BlockType(code, 1, DTYPE_SIZES[name]) for name, code in PLAIN_TYPES.items()},
    }.items()
}


# Codes whose factors are in other tensors; a group of bytes has whole codes.
SCALED_TYPES: Mapping[str, BlockType] = {
    name: BlockType(-1, len(packing_of(name)), len(packing_of(name)) * bits_of(name) // 8) for name in NAMES
}
_ALL_BLOCKS = {**BLOCK_TYPES, **SCALED_TYPES}
QUANTISED = tuple(_ALL_BLOCKS)  # all types that are read and are neither floats nor integers


def nbytes_of(dtype: str, count: int) -> int:
    """Return the bytes of `count` values, in whole blocks. Raises KeyError for a dtype that is not read."""
    kind = _ALL_BLOCKS.get(dtype)
    return count * DTYPE_SIZES[dtype] if kind is None else -(-count // kind.values) * kind.nbytes


def type_for(wanted: str, columns: int) -> str | None:
    """Return the type of blocks for rows of `columns` values: `wanted`, else its fallback; None where none fits."""
    kind = BLOCK_TYPES.get(wanted)
    if kind is None or columns % kind.values == 0:
        return wanted if kind else None
    return type_for(kind.fallback, columns)
