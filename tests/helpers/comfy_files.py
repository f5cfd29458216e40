"""Reads files that are quantised for ComfyUI, as its loader does with comfy-kitchen."""

import json
from pathlib import Path
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class
from safetensors import safe_open
from safetensors.torch import load_file

LAYOUTS = {
    "float8_e4m3fn": "TensorCoreFP8Layout",
    "float8_e5m2": "TensorCoreFP8Layout",
    "int8_tensorwise": "TensorWiseINT8Layout",
    "mxfp8": "TensorCoreMXFP8Layout",
    "nvfp4": "TensorCoreNVFP4Layout",
}  # comfy/quant_ops.py: QUANT_ALGOS


def opened(path: Path, prefix: str = "") -> dict[str, QuantizedTensor]:
    """The quantised weights as ComfyUI's loader makes them (comfy/ops.py), by the layers that both transports name."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        layers = json.loads(file.metadata()["_quantization_metadata"])["layers"]
    assert {key.removesuffix(".comfy_quant") for key in tensors if key.endswith(".comfy_quant")} == layers.keys()
    found = {}
    for layer, settings in layers.items():
        assert json.loads(tensors[f"{layer}.comfy_quant"].numpy().tobytes()) == settings
        kind, weight, scale = settings["format"], tensors[f"{layer}.weight"], tensors[f"{layer}.weight_scale"]
        form = get_layout_class(LAYOUTS[kind])
        shape = (weight.shape[0], weight.shape[1] * (2 if kind == "nvfp4" else 1))
        known: dict[str, Any] = {"orig_dtype": torch.float32, "orig_shape": shape}
        if kind == "nvfp4":
            overall, blocks = tensors[f"{layer}.weight_scale_2"], scale.view(torch.float8_e4m3fn)
            params = form.Params(scale=overall, block_scale=blocks, **known)
        else:
            params = form.Params(scale=scale.view(torch.float8_e8m0fnu) if kind == "mxfp8" else scale, **known)
        found[layer.removeprefix(prefix)] = QuantizedTensor(weight, LAYOUTS[kind], params)
    return found
