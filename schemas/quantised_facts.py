"""The facts of each format of quantised weights: its error, and the programs that read it."""

from collections.abc import Mapping
from typing import NamedTuple

from .block_types import BLOCK_TYPES
from .comfy_formats import FORMATS
from .dtypes import FP8


class QuantisedFacts(NamedTuple):
    """The weights of a component in one format: how many, the bits of a value with its share of the factors, the
    relative root mean square error of normal numbers (None: not known), and the programs that read the format."""

    tensors: int
    bits: float
    error: float | None
    readers: str


COMFYUI, GGUF, PLAIN = "ComfyUI", "GGUF", "plain"
READERS: Mapping[str, str] = {
    COMFYUI: "ComfyUI",
    PLAIN: "ComfyUI",
    GGUF: "diffusers (from_single_file with GGUFQuantizationConfig)",
    "torchao": "diffusers with torchao",
    "bitsandbytes": "diffusers with bitsandbytes",
    "SDNQ": "diffusers with sdnq, SD.Next",
}

# Measured with the values of each type. Rows have 1024 values where they have one factor; SDNQ has its usual groups.
ERRORS: Mapping[str, float] = {
    "ComfyUI float8_e4m3fn": 0.026,
    "ComfyUI float8_e5m2": 0.053,
    "ComfyUI int8_tensorwise": 0.010,
    "ComfyUI mxfp8": 0.027,
    "ComfyUI nvfp4": 0.095,
    "plain F8_E4M3": 0.026,
    "plain F8_E5M2": 0.053,
    "torchao Int8Tensor": 0.0078,
    "torchao Float8Tensor": 0.026,
    "bitsandbytes nf4": 0.092,
    "bitsandbytes fp4": 0.122,
    "bitsandbytes int8": 0.0078,
    "SDNQ int2": 0.59,
    "SDNQ int3": 0.23,
    "SDNQ int4": 0.108,
    "SDNQ int5": 0.055,
    "SDNQ int6": 0.028,
    "SDNQ int7": 0.015,
    "SDNQ int8": 0.0078,
    "SDNQ uint2": 0.33,
    "SDNQ uint3": 0.17,
    "SDNQ uint4": 0.090,
    "SDNQ uint5": 0.048,
    "SDNQ uint6": 0.026,
    "SDNQ uint7": 0.0139,
    "SDNQ uint8": 0.0074,
    "SDNQ float8_e4m3fn": 0.026,
    "SDNQ float4_e2m1fn": 0.106,
    "SDNQ float6_e3m2fn": 0.052,
}


def format_name(kind: str, dtype: str) -> str | None:
    """Return the program and the format of a weight whose scale names `kind`; None for a weight that is a float.

    Types of GGUF files have their own names."""
    if kind:
        return f"{COMFYUI} {kind}" if kind in FORMATS else kind
    if dtype in BLOCK_TYPES:
        return dtype
    return f"{PLAIN} {dtype}" if dtype in FP8 else None


def facts_of(name: str, tensors: int, bits: float) -> QuantisedFacts:
    """Return the facts of a format that `format_name` gave."""
    block = BLOCK_TYPES.get(name)
    error = block.error if block else ERRORS.get(name)
    return QuantisedFacts(tensors, bits, error, READERS[GGUF if block else name.partition(" ")[0]])
