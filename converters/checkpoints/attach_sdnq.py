"""Gives the weights that SDNQ (the quantisation of SD.Next) quantised their scales.

A layer X has codes in `X.weight`, factors in `X.scale` and, for unsigned codes, `X.zero_point`. The kind of its codes
is in the `quantization_config` of config.json beside the weights, or in quantization_config.json."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from ...schemas.block_types import SCALED_TYPES
from ...schemas.dtypes import DTYPES, FLOATS, FP8
from ...schemas.tensors import Shape
from ...storage.safetensors_reader import Header, Scale, TensorRange
from .layer_parts import LayerParts, with_weights

PROGRAM = "SDNQ"
WEIGHT, SCALE = ".weight", ".scale"
PACKED = "U8"
CODES = (PACKED, "I8", *FP8)  # dtypes of weights in the file
# Codes with a dtype of safetensors -> as they are read. All others are packed.
PLAIN: Mapping[str, tuple[str, str]] = {
    "int8": ("I8", "INT8"),
    "uint8": ("U8", "UINT8"),
    "float8_e4m3fn": ("F8_E4M3", "F8_E4M3"),
    "float8_e5m2": ("F8_E5M2", "F8_E5M2"),
}
# The bits of exponent that SDNQ's short names mean, from fp2 and ufp1 on.
EXPONENTS: Mapping[str, tuple[int, ...]] = {"fp": (0, 1, 1, 2, 2, 3, 3), "ufp": (1, 1, 1, 2, 2, 3, 3, 4)}
SHORT: Mapping[str, str] = {
    **{
        f"{kind}{bits}": f"float{bits}_e{exponent}m{bits - (kind == 'fp') - exponent}fn{'u' * (kind == 'ufp')}"
        for kind, exponents in EXPONENTS.items()
        for bits, exponent in enumerate(exponents, start=1)
    },
    "fp1": "float1_e1m0fnu",
    "fp8": "float8_e4m3fn",
    "int1": "uint1",
    "bool": "uint1",
}
# Tensors and settings of what is not read -> what it is.
UNREAD_PARTS: Mapping[str, str] = {
    "svd_up": "a part of low rank (use_svd)",
    "scale_2": "quantised scales (scale_dtype)",
    "zero_point_scale": "quantised zero points (zero_point_dtype)",
}
UNREAD_SETTINGS: Mapping[str, str] = {"use_hadamard": "rotated weights", "use_codebook": "a codebook of values"}
ADVICE = "save what `sdnq.dequantizer.dequantize_sdnq_model` gives"


def attach_sdnq(header: Header, settings: Mapping[str, Any]) -> Header:
    """Return the header with the scale of each quantised weight, without the tensors of scales.

    `settings` is the `quantization_config`, empty where there is none. Raises LayoutError for types that are not read
    and for tensors that are missing or do not fit."""
    return with_weights(header, _weights(header, settings))


def _weights(header: Header, settings: Mapping[str, Any]) -> Iterator[tuple[LayerParts, TensorRange]]:
    for layer in _layers(header, settings):
        names = {part: f"{layer}.{part}" for part in ("weight", "scale", "zero_point", "bias", *UNREAD_PARTS)}
        parts = LayerParts(header, PROGRAM, layer + WEIGHT, names)
        if not settings:
            raise parts.error("what its codes are is in config.json", "put config.json beside the file")
        yield parts, _weight(parts, _type(parts, settings))


def _layers(header: Header, settings: Mapping[str, Any]) -> list[str]:
    """Return the layers whose weight is no float; and those of floats that have a scale, where settings name SDNQ."""
    weights = {name.removesuffix(WEIGHT): tensor for name, tensor in header.tensors.items() if name.endswith(WEIGHT)}
    scaled = {layer for layer in weights if layer + SCALE in header.tensors}
    codes = {layer for layer in weights if weights[layer].dtype in CODES and weights[layer].scale is None}
    return [layer for layer in weights if layer in (scaled | codes if settings else scaled & codes)]


def _type(parts: LayerParts, settings: Mapping[str, Any]) -> str:
    """Return SDNQ's name of the layer's codes. Raises LayoutError for one that is not read."""
    own = _table(parts, settings, "modules_quant_config", dict)
    dtypes = _table(parts, settings, "modules_dtype_dict", list)
    match = next((key for key in own if _named(parts.name, [key])), None)
    chosen: Mapping[str, Any] = {**settings, **(own[match] if match else {})}
    unread = [what for key, what in UNREAD_SETTINGS.items() if chosen.get(key)]
    unread += [what for part, what in UNREAD_PARTS.items() if parts.has(part)]
    if unread:
        raise parts.error(f"it has {unread[0]}, which is not supported", ADVICE)
    named = (key for key, modules in dtypes.items() if _named(parts.name, modules))
    name = next(named, chosen.get("weights_dtype"))
    full = SHORT.get(str(name).lower(), str(name).lower())
    if full not in PLAIN and full.upper() not in SCALED_TYPES:
        raise parts.error(
            f"its type {name} is not supported; expected one of 1 to 8 bits, such as int8 or uint4", ADVICE
        )
    return full


def _table(parts: LayerParts, settings: Mapping[str, Any], name: str, kind: type) -> dict[str, Any]:
    """Return a table of the settings, whose values are of `kind`. Raises LayoutError for anything else."""
    found = settings.get(name) or {}
    if isinstance(found, dict) and all(isinstance(value, kind) for value in found.values()):
        return found
    raise parts.error(f"{name} in its settings is {str(found)[:80]}, expected a table of {kind.__name__}s", ADVICE)


def _named(name: str, patterns: Iterable[Any]) -> bool:
    """Return whether a pattern of SDNQ fits the name: a beginning after a dot, a part between dots, or one with `*`."""
    return any(
        name.startswith(pattern[1:])
        if pattern.startswith(".")
        else pattern in (name, *name.split("."))
        or ("*" in pattern and fnmatchcase(name, re.sub(r"([?[])", r"[\1]", pattern) + "*"))
        for pattern in map(str, patterns)
    )


def _weight(parts: LayerParts, kind: str) -> TensorRange:
    factors = parts.take("scale", FLOATS)
    stored, dtype = PLAIN.get(kind, (PACKED, kind.upper()))
    codes = parts.take("weight", (stored,))
    shape = _shape(parts, codes, factors, dtype, packed=kind not in PLAIN)
    block = SCALED_TYPES.get(dtype)
    count, number = math.prod(shape), math.prod(factors.shape)
    parts.require_bytes(codes, -(-count // block.values) * block.nbytes if block else count, shape)
    if not number or count % number:
        raise parts.error(
            f"{parts.names['scale']} has shape {list(factors.shape)}, which does not divide {list(shape)}"
        )
    unsigned = kind.startswith("uint") or kind.endswith("u")
    plus = parts.take("zero_point", (factors.dtype,), number) if unsigned else None
    rounded = factors.dtype if factors.dtype in ("F16", "BF16") else ""
    group = count // number if number > 1 else 0
    return replace(
        codes,
        dtype=dtype,
        shape=shape,
        scale=Scale(factors, group, plus=plus, rounded=rounded, kind=f"{PROGRAM} {kind}"),
    )


def _shape(parts: LayerParts, codes: TensorRange, factors: TensorRange, dtype: str, *, packed: bool) -> Shape:
    """Return the shape of the weight, which packed codes and groups do not have in the file."""
    grouped, tail = factors.shape, factors.shape[2:]
    if any(size != 1 for size in tail) or len(grouped) < 2:
        raise parts.error(f"{parts.names['scale']} has shape {list(grouped)}, expected factors of rows", ADVICE)
    if grouped[0] == 1 and math.prod(grouped) > 1:
        raise parts.error("it is stored transposed (use_quantized_matmul), which is not supported", ADVICE)
    with_rows = factors
    if math.prod(grouped) == 1:  # packed codes have one axis, but the bias beside them has a value for each row
        with_rows = parts.find("bias", DTYPES) if packed else codes
    rows = (*with_rows.shape, 0)[0]
    if not rows:
        raise parts.error("the number of its rows is unknown: its scale, its codes or its bias have none", ADVICE)
    block = SCALED_TYPES.get(dtype)
    count = codes.nbytes // block.nbytes * block.values if block else codes.nbytes
    return rows, count // rows
