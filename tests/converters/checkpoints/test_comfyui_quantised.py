"""Files that ComfyUI quantised: every format becomes the values that comfy-kitchen's eager backend gives; bad ones
get one clear line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy_kitchen.backends.eager.quantization as kitchen
import pytest
import torch
from safetensors.torch import load_file, save_file

from cascadekit import convert, export, inspect
from cascadekit.parity.checkpoints.compare_tensors import compare_checkpoints
from cascadekit.schemas.comfy_formats import CHOICES
from cascadekit.schemas.errors import CascadeError, CheckpointError, ConversionError, LayoutError
from cascadekit.schemas.stages import Stage
from helpers.matrix import Matrix

Tensors = dict[str, torch.Tensor]


def fp8(weight: torch.Tensor, dtype: torch.dtype) -> tuple[Tensors, torch.Tensor]:
    scale = weight.abs().max() / torch.finfo(dtype).max
    stored = kitchen.quantize_per_tensor_fp8(weight, scale, dtype)
    return {"weight": stored, "weight_scale": scale}, kitchen.dequantize_per_tensor_fp8(stored, scale, torch.float32)


def int8(weight: torch.Tensor, *, rows: bool) -> tuple[Tensors, torch.Tensor]:
    stored, scale = (kitchen.quantize_int8_rowwise if rows else kitchen.quantize_int8_tensorwise)(weight)
    return {"weight": stored, "weight_scale": scale}, kitchen.dequantize_int8_simple(stored, scale)


def mxfp8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    stored, scale = kitchen.quantize_mxfp8(weight)
    worth = kitchen.dequantize_mxfp8(stored, scale, torch.float32)
    return {"weight": stored, "weight_scale": scale.view(torch.uint8)}, worth


def nvfp4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    overall = weight.abs().max() / (448 * 6)
    stored, scale = kitchen.quantize_nvfp4(weight, overall)
    worth = kitchen.dequantize_nvfp4(stored, overall, scale, torch.float32)
    return {"weight": stored, "weight_scale": scale, "weight_scale_2": overall}, worth


FORMATS: dict[str, tuple[str, Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]]] = {
    "e4m3": ("float8_e4m3fn", lambda weight: fp8(weight, torch.float8_e4m3fn)),
    "e5m2": ("float8_e5m2", lambda weight: fp8(weight, torch.float8_e5m2)),
    "int8": ("int8_tensorwise", lambda weight: int8(weight, rows=False)),
    "int8 rows": ("int8_tensorwise", lambda weight: int8(weight, rows=True)),
    "mxfp8": ("mxfp8", mxfp8),
    "nvfp4": ("nvfp4", nvfp4),
}


def quantised(original: Path, path: Path, name: str, *, header: bool, prefix: str = "") -> Tensors:
    """Stage C at `path` with its matrices quantised, described in the header or in tensors, and what it is worth."""
    kind, quantise = FORMATS[name]
    convert(original / "stage_c.safetensors", path, "split", force=True)
    stored: Tensors = {}
    worth: Tensors = {}
    layers = {}
    for key, tensor in load_file(path).items():
        if tensor.ndim != 2 or tensor.shape[1] % 32 or not key.endswith(".weight"):
            stored[prefix + key] = worth[key] = tensor
            continue
        layer = prefix + key.removesuffix(".weight")
        parts, worth[key] = quantise(tensor)
        stored |= {f"{layer}.{part}": value.contiguous() for part, value in parts.items()}
        stored[f"{layer}.input_scale"] = torch.tensor(1.0)
        layers[layer] = {"format": kind}
        if not header:
            data = json.dumps(layers[layer]).encode()
            stored[f"{layer}.comfy_quant"] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    assert len(layers) > 20
    save_file(stored, path, {"_quantization_metadata": json.dumps({"layers": layers})} if header else None)
    return worth


@pytest.mark.parametrize("header", [True, False], ids=["header", "tensors"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_as_comfy_kitchen_does(
    original: Path, tmp_path: Path, name: str, header: bool, matrix: Matrix
) -> None:
    path = tmp_path / "c.safetensors"
    worth = quantised(original, path, name, header=header, prefix="" if header else "model.diffusion_model.")
    for dtype, cast in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        done = convert(path, tmp_path / f"{dtype}.safetensors", "split", dtype=dtype)
        found = load_file(tmp_path / f"{dtype}.safetensors")
        assert found.keys() == worth.keys()
        assert all(torch.equal(found[key], worth[key].to(cast)) for key in worth)
        assert any(f"weights in {FORMATS[name][0]} have scales" in note for note in done.notes)
        assert any("input_scale" in note for note in done.notes)
    assert not inspect(path).components[Stage.PRIOR].problems
    assert compare_checkpoints(inspect(path), inspect(tmp_path / "fp32.safetensors"))
    with pytest.raises(ConversionError, match='dtype="bf16"'):
        convert(path, tmp_path / "kept.safetensors", "original")
    choice = next(choice for choice, kind in CHOICES.items() if kind == FORMATS[name][0])
    matrix.record(f"comfyui {choice.lower()}", "read", by="comfy-kitchen")
    matrix.record(f"comfyui {choice.lower()}", "error", 0, by="comfy-kitchen")


def test_a_bundle_and_a_gguf_file_of_nvfp4(original: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    quantised(original, path, "nvfp4", header=True)
    convert(path, tmp_path / "plain.safetensors", "split", dtype="fp32")
    for source in ("c", "plain"):
        convert(tmp_path / f"{source}.safetensors", tmp_path / f"{source}.gguf", "gguf", quantize="q8_0")
        export(tmp_path / f"{source}.safetensors", tmp_path / source)
    assert compare_checkpoints(inspect(tmp_path / "c.gguf"), inspect(tmp_path / "plain.gguf"))
    found, expected = (load_file(tmp_path / source / "prior" / "weights.safetensors") for source in ("c", "plain"))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def change(path: Path, edit: Callable[[Tensors, str, dict[str, Any]], None]) -> str:
    """Edit the tensors of an nvfp4 file and the description of its first quantised layer, whose name is returned."""
    tensors = load_file(path)
    layer = next(key for key in tensors if key.endswith(".weight_scale_2")).removesuffix(".weight_scale_2")
    layers = {key.removesuffix(".weight_scale_2"): {"format": "nvfp4"} for key in tensors if key.endswith("_scale_2")}
    edit(tensors, layer, layers[layer])
    save_file(tensors, path, {"_quantization_metadata": json.dumps({"layers": layers})})
    return layer


BAD: dict[str, Callable[[Tensors, str, dict[str, Any]], object]] = {
    "weight_scale_2 is missing, the scale of .*weight": lambda t, x, _: t.pop(f"{x}.weight_scale_2"),
    "weight_scale is missing": lambda t, x, _: t.pop(f"{x}.weight_scale"),
    "as svdquant_w4a4, which is not supported yet; expected one of float8": lambda t, x, s: s.update(
        format="svdquant_w4a4"
    ),
    "rotated or scaled weights": lambda t, x, s: s.update(convrot=True),
    "as rotated or scaled": lambda t, x, s: s.update(params={"convrot": True}),
    "weight: nvfp4 expected U8, found I8": lambda t, x, _: t.update({f"{x}.weight": t[f"{x}.weight"].view(torch.int8)}),
    r"weight_scale is F8_E4M3 \[3\]; expected one number, or \d+ of F8_E4M3": lambda t, x, _: t.update(
        {f"{x}.weight_scale": torch.zeros(3, dtype=torch.float8_e4m3fn)}
    ),
    r"weight_scale_2 is F32 \[2\]; expected one number": lambda t, x, _: t.update(
        {f"{x}.weight_scale_2": torch.ones(2)}
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_descriptions_get_one_clear_line(original: Path, tmp_path: Path, message: str) -> None:
    path = tmp_path / "c.safetensors"
    quantised(original, path, "nvfp4", header=True)
    layer = change(path, BAD[message])
    with pytest.raises(LayoutError, match=message) as caught:
        inspect(path)
    assert layer in str(caught.value)
    assert str(path) in str(caught.value)
    assert "get the checkpoint in" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_scale_that_is_not_finite_and_json_that_is_none(original: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    quantised(original, path, "nvfp4", header=True)
    change(path, lambda t, x, _: t.update({f"{x}.weight_scale_2": torch.tensor(torch.inf)}))
    with pytest.raises(CascadeError, match=r"scale at byte \d+ is (inf|nan)"):
        convert(path, tmp_path / "x.safetensors", "split", dtype="fp32")
    save_file(load_file(path), path, {"_quantization_metadata": "{"})
    with pytest.raises(CheckpointError, match=r"_quantization_metadata or \.comfy_quant cannot be read"):
        inspect(path)
