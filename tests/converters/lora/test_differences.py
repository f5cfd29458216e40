"""Differences of whole weights, biases and norms: merged, cut for joined attention, converted, or refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cascadekit.converters.lora.convert_lora import convert_lora
from cascadekit.converters.lora.merge_checkpoint import merge_loras
from cascadekit.converters.lora.read_formats import open_lora
from cascadekit.schemas.errors import ConversionError, LayoutError
from cascadekit.schemas.lora_keys import Algorithm, LoraTarget
from cascadekit.schemas.stages import Stage

WIDE = "up_blocks.1.0.channelwise.0"  # [256, 128]
NORM = "text_model.encoder.layers.1.layer_norm2"
ATTENTION = "down_blocks.0.2.attention"


def flat(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_and_weight(bench: Any, numbers: Any, strength: float, dtype: torch.dtype) -> None:
    weight, bias = numbers(1, 256, 128).to(dtype), numbers(2, 256).to(dtype)
    merged = bench.merge(
        bench.checkpoint(),
        [bench.lora({f"{flat(WIDE)}.diff": weight, f"{flat(WIDE)}.diff_b": bias})],
        strengths=[strength],
    )
    for name, change in ((f"{WIDE}.weight", weight), (f"{WIDE}.bias", bias)):
        torch.testing.assert_close(merged[name], bench.weights[name] + strength * change.float(), rtol=0, atol=0)


def test_unmerged_again(bench: Any, numbers: Any, tmp_path: Path) -> None:
    lora = bench.lora({f"{flat(WIDE)}.diff_b": numbers(2, 256)})
    merge_loras(bench.checkpoint(), [lora], tmp_path / "a.safetensors")
    again = bench.merge(tmp_path / "a.safetensors", [lora], unmerge=True)
    torch.testing.assert_close(again[f"{WIDE}.bias"], bench.weights[f"{WIDE}.bias"], rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_joined_attention(bench: Any, numbers: Any, layout: str) -> None:
    key = flat(f"{ATTENTION}.attn.in_proj")
    weight, bias = numbers(1, 192, 64), numbers(2, 192)
    merged = bench.merge(bench.checkpoint(layout), [bench.lora({f"{key}.diff": weight, f"{key}.diff_b": bias})])
    for part, rows, values in zip(("to_q", "to_k", "to_v"), weight.chunk(3), bias.chunk(3), strict=True):
        name = f"{ATTENTION}.{part}"
        torch.testing.assert_close(merged[f"{name}.weight"], bench.weights[f"{name}.weight"] + rows)
        torch.testing.assert_close(merged[f"{name}.bias"], bench.weights[f"{name}.bias"] + values)


def test_norms_go_to_comfyui_by_dotted_names(bench: Any, numbers: Any, tmp_path: Path) -> None:
    """comfy/lora.py knows the text encoder's norms by no other name."""
    lora = bench.lora(
        {f"lora_te_{NORM.replace('.', '_')}.w_norm": numbers(1, 8), f"{flat(WIDE)}.diff_b": numbers(2, 256)}
    )
    convert_lora(lora, tmp_path / "comfyui.safetensors", "comfyui")
    tensors = load_file(tmp_path / "comfyui.safetensors")
    assert tensors.keys() == {f"text_encoders.clip_g.transformer.{NORM}.diff", f"diffusion_model.{WIDE}.diff_b"}
    assert open_lora(tmp_path / "comfyui.safetensors").adapters.keys() == {
        LoraTarget(Stage.TEXT_ENCODER, NORM),
        LoraTarget(Stage.PRIOR, WIDE, "bias"),
    }


@pytest.mark.parametrize("to", ["peft", "diffusers", "onetrainer", "stability"])
def test_formats_without_differences_name_them(bench: Any, numbers: Any, tmp_path: Path, to: str) -> None:
    tensors = {
        f"{flat(ATTENTION)}_attn_to_q.lora_{x}.weight": numbers(1, *s) for x, s in (("up", (64, 2)), ("down", (2, 64)))
    }
    lora = bench.lora(tensors | {f"{flat(WIDE)}.diff_b": numbers(2, 256)})
    with pytest.raises(ConversionError, match=rf"{WIDE}.bias: the format holds"):
        convert_lora(lora, tmp_path / "x.safetensors", to)
    done = convert_lora(lora, tmp_path / "x.safetensors", to, drop=True)
    assert any(f"left out: {WIDE}.bias" in note for note in done.notes)
    assert all(
        adapter.algorithm is Algorithm.LORA for adapter in open_lora(tmp_path / "x.safetensors").adapters.values()
    )


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{flat(WIDE)}.diff_b": torch.ones(128)}, r"weight \[256\], found those of \[128\]"),
        ({f"{flat(WIDE)}.diff": torch.ones(128, 256)}, r"\[256, 128\], found those of \[128, 256\]"),
        ({f"{flat(WIDE)}.diff_b": torch.ones(())}, "a tensor with axes, found a single number: diff"),
        ({f"{flat(WIDE)}.diff": torch.ones(256, 128), f"{flat(WIDE)}.w_norm": torch.ones(256)}, "second"),
        ({f"lora_te_{NORM.replace('.', '_')}.lora_up.weight": torch.ones(8, 2)}, r"lora_down \+ lora_up"),
    ],
)
def test_misfits(bench: Any, tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        bench.merge(bench.checkpoint(), [bench.lora(tensors)])
