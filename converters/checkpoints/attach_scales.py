"""Gives the quantised weights of ComfyUI's files their scales, and removes the tensors that only describe them.

A layer X is quantised in one of FORMATS, which is named in the header's metadata or in the JSON of the tensor
`X.comfy_quant`. Its scales are `X.weight_scale` and, in nvfp4, `X.weight_scale_2`. Older files have fp8 alone, with
`X.scale_weight` and a tensor `scaled_fp8`."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...schemas.comfy_formats import FORMATS, METADATA, OVERALL, QUANT, SCALE, WEIGHT, ComfyFormat, tiled_size
from ...schemas.dtypes import FLOATS
from ...schemas.errors import CheckpointError, LayoutError
from ...schemas.json_text import load_object
from ...schemas.messages import listed
from ...storage.safetensors_reader import Header, Scale, TensorRange
from .layer_parts import content

MARKER = "scaled_fp8"  # a tensor of at most two values
OLD_SCALE = ".scale_weight"
INPUT = ".input_scale"
INPUTS = (".scale_input", INPUT)  # for products with rounded inputs only
OTHER_DTYPES = "get the checkpoint in bf16, fp16 or fp8"
MAX_JSON_BYTES = 4096  # of the description of one layer


def attach_scales(header: Header) -> tuple[Header, list[str]]:
    """Give each quantised weight of a file of ComfyUI its scales, and remove the tensors that only describe them.

    Returns the header and notes for the user. Raises LayoutError for a format that is not read and for scales that are
    missing or do not fit, each by its name."""
    tensors = dict(header.tensors)
    formats = _formats(header)
    used = [name for name in tensors if name.endswith(QUANT) or _is_marker(name, tensors[name])]
    for name in [name for name in tensors if name.endswith((SCALE, OLD_SCALE))]:
        layer = name.rpartition(".")[0]
        if layer + WEIGHT in tensors and layer not in formats:
            formats[layer] = {"format": _guessed(tensors, layer)}
    for layer, settings in formats.items():
        tensors[layer + WEIGHT], scales = _scaled(header, layer, settings)
        used += scales
    inputs = [name for name in tensors if name.endswith(INPUTS) and name.rpartition(".")[0] in formats]
    notes = []
    if inputs:
        kind = inputs[0].rpartition(".")[2]
        notes.append(
            f"{header.path}: a cast leaves out {len(inputs)} {kind}, which only products of rounded inputs use"
        )
    left = {name: tensor for name, tensor in tensors.items() if name not in {*used, *inputs}}
    metadata = {key: text for key, text in header.metadata.items() if key != METADATA}
    return replace(header, tensors=left, metadata=metadata), notes


def _is_marker(name: str, tensor: TensorRange) -> bool:
    return name.rpartition(".")[2] == MARKER and math.prod(tensor.shape) <= 2


def _guessed(tensors: Mapping[str, TensorRange], layer: str) -> str:
    """The format of a layer without a description at hand: in older files, and in headers from the Hub."""
    scale = tensors.get(layer + SCALE)
    if layer + OVERALL in tensors:
        return "nvfp4"
    if scale is not None and scale.dtype in FORMATS["mxfp8"].scales:
        return "mxfp8"
    dtype = tensors[layer + WEIGHT].dtype
    return {"F8_E5M2": "float8_e5m2", "I8": "int8_tensorwise"}.get(dtype, "float8_e4m3fn")


def _formats(header: Header) -> dict[str, dict[str, Any]]:
    """Return the settings of each quantised layer, from the metadata and from tensors of JSON."""
    try:
        layers = load_object(header.metadata.get(METADATA, "{}")).get("layers", {})
        found = {layer: dict(settings) for layer, settings in layers.items()}
        for name, tensor in header.tensors.items():
            if name.endswith(QUANT) and tensor.path.is_file():  # headers from the Hub come without tensors
                found[name.removesuffix(QUANT)] = _settings(name, tensor)
        return found
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{header.path}: {METADATA} or {QUANT} cannot be read: {error}; download or save the file again"
        ) from error


def _settings(name: str, tensor: TensorRange) -> dict[str, Any]:
    if tensor.dtype != "U8" or tensor.nbytes > MAX_JSON_BYTES:
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, expected the bytes of JSON")
    return load_object(content(tensor).decode("utf-8"))


def _scaled(header: Header, layer: str, settings: Mapping[str, Any]) -> tuple[TensorRange, list[str]]:
    """Return the weight of a layer with its scales, and the names of the scales.

    The scale also has what a file in the same format has beside the weight, under the names of newer files."""
    tensors, kind = header.tensors, settings.get("format")
    form = FORMATS.get(kind) if isinstance(kind, str) else None
    if form is None or _is_rotated(settings) or f"{layer}.pre_quant_scale" in tensors:
        what = "rotated or scaled weights" if form else kind
        raise LayoutError(
            f"{header.path}: {layer}: quantised by ComfyUI as {what}, which is not supported yet; expected one of "
            f"{', '.join(FORMATS)}; {OTHER_DTYPES}"
        )
    weight = tensors.get(layer + WEIGHT)
    if weight is None or weight.dtype not in (form.stored, *FLOATS) or not weight.shape:
        found = f"{weight.dtype} {list(weight.shape)}" if weight else "nothing"
        raise LayoutError(
            f"{header.path}: {layer}{WEIGHT}: {kind} expected {form.stored}, found {found}; {OTHER_DTYPES}"
        )
    names = [layer + (OLD_SCALE if layer + OLD_SCALE in tensors else SCALE)]
    if kind == "nvfp4":
        names.append(layer + OVERALL)
    missing = [name for name in names if name not in tensors]
    if missing:
        raise LayoutError(f"{header.path}: {listed(missing)} is missing, the scale of {layer}{WEIGHT}; {OTHER_DTYPES}")
    shape = (*weight.shape[:-1], weight.shape[-1] * (2 if form.dtype == "FP4" else 1))
    parts = dict(zip((SCALE, OVERALL), (tensors[name] for name in names), strict=False))
    for name in (layer + each for each in INPUTS if layer + each in tensors):
        parts[INPUT] = tensors[name]
    scale = _scale(names, tensors, shape, form)
    scale = replace(scale, kind=str(kind), parts=tuple(parts.items()), settings=json.dumps(settings))
    dtype = form.dtype if weight.dtype == form.stored else weight.dtype
    return replace(weight, dtype=dtype, shape=shape, scale=scale), names


def _is_rotated(settings: Mapping[str, Any]) -> bool:
    """Whether the columns of a weight were mixed before rounding; ComfyUI looks in two places."""
    nested = settings.get("params")
    return bool(settings.get("convrot") or (isinstance(nested, dict) and nested.get("convrot")))


def _scale(names: list[str], tensors: Mapping[str, TensorRange], shape: tuple[int, ...], form: ComfyFormat) -> Scale:
    """Return the factors of a weight. Raises LayoutError for factors of another dtype or number."""
    factors = tensors[names[0]]
    count, columns = math.prod(factors.shape), math.prod(shape[1:])
    if form.group:
        tiles = (shape[0], columns // form.group)
        expected, scale = [tiled_size(*tiles)], Scale(factors, form.group, tiles)
    else:
        expected, scale = [1, shape[0]], Scale(factors, 0 if count == 1 else columns)
    if factors.dtype not in form.scales or count not in expected:
        raise LayoutError(
            f"{factors.path}: {names[0]} is {factors.dtype} {list(factors.shape)}; expected one number, or "
            f"{expected[-1]} of {' or '.join(form.scales)}, for a weight of shape {list(shape)}; {OTHER_DTYPES}"
        )
    if len(names) == 1:
        return scale
    overall = tensors[names[1]]
    if math.prod(overall.shape) != 1 or overall.dtype not in FLOATS:
        raise LayoutError(
            f"{overall.path}: {names[1]} is {overall.dtype} {list(overall.shape)}; expected one number; {OTHER_DTYPES}"
        )
    return replace(scale, overall=overall)
