"""ComfyUI's scaled fp8: weights in fp8, each with a number beside it that all its values are to be multiplied by.

`X.scale_weight` belongs to `X.weight`; `X.scale_input` is for products in fp8 and says nothing of the weights; an
empty tensor `scaled_fp8`, or one of two values, marks the file. What ComfyUI writes since (`X.comfy_quant` and
`X.weight_scale`) has many formats, and is refused by name.
"""

import math
from dataclasses import replace

from ...schemas.dtypes import FLOATS, FP8
from ...schemas.errors import LayoutError
from ...storage.safetensors_reader import Header, TensorRange

MARKER = "scaled_fp8"
WEIGHT, SCALE, INPUT_SCALE = ".weight", ".scale_weight", ".scale_input"
NEWER = (".comfy_quant", ".weight_scale", ".weight_scale_2")
NEWER_METADATA = "_quantization_metadata"


def attach_scales(header: Header) -> tuple[Header, list[str]]:
    """The same tensors, each scaled weight with its scale and without the names that describe it; and remarks.

    Raises LayoutError for a scale that is not one number, and for quantised files of other kinds."""
    tensors = header.tensors
    newer = next((name for name in tensors if name.endswith(NEWER)), None)
    if newer or NEWER_METADATA in header.metadata:
        raise LayoutError(
            f"{header.path}: quantised by ComfyUI ({newer or NEWER_METADATA}), which is not supported yet; "
            "get the checkpoint in bf16, fp16 or plain fp8"
        )
    scales = {name: _weight_of(name, SCALE) for name in tensors if name.endswith(SCALE)}
    scales = {name: weight for name, weight in scales.items() if weight in tensors}
    inputs = [name for name in tensors if name.endswith(INPUT_SCALE) and _weight_of(name, INPUT_SCALE) in tensors]
    markers = [name for name in tensors if name.rpartition(".")[2] == MARKER and math.prod(tensors[name].shape) <= 2]
    if not scales:
        return _without(header, markers) if markers else header, []
    scaled = {weight: _scaled(name, tensors[name], weight, tensors[weight]) for name, weight in scales.items()}
    notes = [f"{header.path}: scaled fp8: {len(scaled)} weights carry a scale, which a cast multiplies in"]
    if inputs:
        notes.append(f"{header.path}: left out {len(inputs)} scale_input, which only products in fp8 use")
    plain = _without(header, [*scales, *inputs, *markers])
    return replace(plain, tensors=plain.tensors | scaled), notes


def _weight_of(name: str, suffix: str) -> str:
    return name.removesuffix(suffix) + WEIGHT


def _scaled(name: str, scale: TensorRange, weight: str, tensor: TensorRange) -> TensorRange:
    if math.prod(scale.shape) != 1 or scale.dtype not in FLOATS:
        raise LayoutError(
            f"{scale.path}: {name} is {scale.dtype} {list(scale.shape)}; expected one number for {weight}. Other "
            "scales are not supported yet; get the checkpoint in bf16, fp16 or plain fp8"
        )
    if tensor.dtype not in (*FLOATS, *FP8):
        raise LayoutError(
            f"{tensor.path}: {weight} is {tensor.dtype} with a scale; expected {' or '.join(FP8)}, "
            "get the checkpoint in bf16, fp16 or plain fp8"
        )
    return replace(tensor, scale=scale)


def _without(header: Header, names: list[str]) -> Header:
    gone = frozenset(names)
    return replace(header, tensors={name: tensor for name, tensor in header.tensors.items() if name not in gone})
