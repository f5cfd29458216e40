"""Copies weights that ComfyUI quantised into other files of ComfyUI: codes and factors stay as they are."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace

from ...schemas.block_types import SCALED_TYPES
from ...schemas.comfy_formats import FORMATS, METADATA, QUANT, WEIGHT
from ...schemas.layouts import Layout
from ...storage.safetensors_plan import TensorPlan
from ...storage.safetensors_reader import TensorRange
from .component import Component
from .constant_values import Constant, constant_text

LAYOUTS = (Layout.COMFYUI, Layout.SPLIT)


def keeps_codes(component: Component, layout: Layout, dtype: str | None) -> bool:
    """True when quantised weights of ComfyUI in `component` are copied: the layout has them, and no cast is asked."""
    return layout in LAYOUTS and dtype is None and any(map(can_copy, component.tensors.values()))


def can_copy(weight: TensorRange) -> bool:
    """True for a weight whose codes and factors, all of them, stand for it in a format of ComfyUI."""
    scale = weight.scale
    form = FORMATS.get(scale.kind) if scale else None
    if scale is None or form is None or weight.dtype != form.dtype:
        return False
    return not scale.group or (scale.tiles or (math.prod(scale.factors.shape),))[0] == weight.shape[0]


def copied(name: str, weight: TensorRange) -> dict[str, TensorPlan]:
    """Plan the tensors of a weight that `can_copy` allows; `name` is that of the weight in the file."""
    scale = weight.scale
    if scale is None:
        raise ValueError(f"{name} has no scale")
    stored, layer = FORMATS[scale.kind].stored, name.removesuffix(WEIGHT)
    block = SCALED_TYPES.get(weight.dtype)
    shape = (*weight.shape[:-1], weight.shape[-1] // (block.values // block.nbytes if block else 1))
    codes = replace(weight, dtype=stored, shape=shape, scale=None)
    parts = {layer + part: TensorPlan(tensor.dtype, tensor.shape, (tensor,)) for part, tensor in scale.parts}
    return {name: TensorPlan(stored, shape, (codes,)), **parts, layer + QUANT: constant_text(scale.settings)}


def described(tensors: Mapping[str, TensorPlan]) -> dict[str, str]:
    """Return the metadata that describes every quantised layer among `tensors`, as ComfyUI reads it."""
    texts = {
        name.removesuffix(QUANT): each.blocks.data
        for name, plan in tensors.items()
        for each in plan.calculated
        if name.endswith(QUANT) and isinstance(each.blocks, Constant)
    }
    layers = {layer: json.loads(text) for layer, text in texts.items()}
    return {METADATA: json.dumps({"format_version": "1.0", "layers": layers})} if layers else {}
