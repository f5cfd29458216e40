"""Files that ComfyUI quantised become other files of ComfyUI by copies: comfy-kitchen reads the same values in both."""

import json
from pathlib import Path

import comfy_kitchen.backends.eager.quantization as kitchen
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cascadekit import convert
from cascadekit.schemas.errors import ConversionError

SPLIT, WHOLE, PREFIX = "c.safetensors", "whole.safetensors", "model.diffusion_model."


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def settings(path: Path) -> dict[str, dict[str, str]]:
    with safe_open(path, "pt") as file:
        layers: dict[str, dict[str, str]] = json.loads(file.metadata()["_quantization_metadata"])["layers"]
    return layers


def nvfp4(original: Path, path: Path) -> dict[str, torch.Tensor]:
    """Stage C quantised by comfy-kitchen and described in the header alone; the values of its weights."""
    convert(original / "stage_c.safetensors", path, "split")
    stored, worth, layers = {}, {}, {}
    for name, tensor in load_file(path).items():
        layer = name.removesuffix(".weight")
        if not name.endswith("channelwise.4.weight"):
            stored[name] = tensor
            continue
        overall = tensor.abs().max() / (448 * 6)
        codes, factors = kitchen.quantize_nvfp4(tensor, overall)
        stored |= {name: codes, f"{layer}.weight_scale": factors, f"{layer}.weight_scale_2": overall}
        stored[f"{layer}.input_scale"] = torch.tensor(0.5)
        layers[layer] = {"format": "nvfp4", "full_precision_matrix_mult": True}
        worth[layer] = kitchen.dequantize_nvfp4(codes, overall, factors, torch.float32)
    assert layers
    save_file(stored, path, {"_quantization_metadata": json.dumps({"layers": layers})})
    return worth


def test_codes_factors_and_settings_are_copied(original: Path, tmp_path: Path) -> None:
    worth = nvfp4(original, tmp_path / SPLIT)
    done = convert([tmp_path / SPLIT, original / "stage_a.safetensors"], tmp_path / WHOLE, "comfyui")
    assert not any("NVFP4 to" in line or "FP4 to" in line for line in done.details)
    before, after = load_file(tmp_path / SPLIT), load_file(tmp_path / WHOLE)
    assert settings(tmp_path / WHOLE) == {PREFIX + name: text for name, text in settings(tmp_path / SPLIT).items()}
    for name, tensor in before.items():
        assert after[PREFIX + name].dtype == tensor.dtype
        assert torch.equal(as_bytes(after[PREFIX + name]), as_bytes(tensor))
    for layer, values in worth.items():
        parts = [after[f"{PREFIX}{layer}.{part}"] for part in ("weight", "weight_scale_2", "weight_scale")]
        assert torch.equal(kitchen.dequantize_nvfp4(*parts, torch.float32), values)
        described = after[f"{PREFIX}{layer}.comfy_quant"].numpy().tobytes()
        assert json.loads(described) == settings(tmp_path / SPLIT)[layer]


def test_the_format_it_has_already_is_copied_and_the_rest_quantised(original: Path, tmp_path: Path) -> None:
    nvfp4(original, tmp_path / SPLIT)
    done = convert(tmp_path / SPLIT, tmp_path / "more.safetensors", "split", quantize="nvfp4", dtype="bf16")
    before, after = load_file(tmp_path / SPLIT), load_file(tmp_path / "more.safetensors")
    names = [name for name in before if name.endswith(("channelwise.4.weight", "weight_scale", "weight_scale_2"))]
    assert all(torch.equal(as_bytes(after[name]), as_bytes(before[name])) for name in names)
    assert len(settings(tmp_path / "more.safetensors")) > len(settings(tmp_path / SPLIT))
    assert any(" copied" in note for note in done.notes)


@pytest.mark.parametrize("to", ["original", "diffusers"])
def test_other_layouts_need_a_dtype(original: Path, tmp_path: Path, to: str) -> None:
    nvfp4(original, tmp_path / SPLIT)
    message = r'is quantised \(FP4\), which this layout does not keep; choose the dtype .* such as dtype="bf16"'
    for canonical in (False, True):
        with pytest.raises(ConversionError, match=message):
            convert(tmp_path / SPLIT, tmp_path / "out", to, canonical=canonical)
