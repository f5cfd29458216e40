"""A LoRA that is given as a checkpoint, and the reverse; files and folders of every kind that hold one."""

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from cascadekit.cli import main
from cascadekit.converters.lora.convert_lora import convert_lora
from cascadekit.converters.lora.merge_checkpoint import merge_loras
from cascadekit.converters.lora.read_formats import holds_lora, open_lora
from cascadekit.schemas.errors import LayoutError

Q = "down_blocks.0.2.attention.to_q"
KEY = "lora_unet_down_blocks_0_2_attention_attn_to_q"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def factors(numbers: Any) -> dict[str, torch.Tensor]:
    return {f"{KEY}.lora_down.weight": numbers(1, 2, 64), f"{KEY}.lora_up.weight": numbers(2, 64, 2)}


def expected(bench: Any, numbers: Any) -> torch.Tensor:
    return bench.weights[f"{Q}.weight"] + numbers(2, 64, 2) @ numbers(1, 2, 64)


def test_exchanged(bench: Any, numbers: Any, tmp_path: Path) -> None:
    checkpoint, lora = bench.checkpoint(), bench.lora(factors(numbers))
    save_file(bench.text_weights, tmp_path / "clip.safetensors")
    (tmp_path / "folder").mkdir()
    save_file(bench.weights, tmp_path / "folder" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "folder" / "config.json").write_text("{}")
    for base, given, text in [
        (lora, checkpoint, "expected a checkpoint, found a LoRA; give the checkpoint first"),
        (checkpoint, checkpoint, r"expected a LoRA, found a checkpoint: prior \(tiny, original layout\)"),
        (checkpoint, tmp_path / "clip.safetensors", "expected a LoRA, found a checkpoint: text_encoder"),
    ]:
        with pytest.raises(Exception, match=text):
            merge_loras(base, [given], tmp_path / "out.safetensors")
    done = call("convert", lora, "--to", "diffusers", "-o", tmp_path / "x")
    assert done.exit_code == 1
    assert "it holds a LoRA" in " ".join(done.output.split())


def test_a_model_folder_as_a_lora(original: Path) -> None:
    done = call("lora", "inspect", original)
    assert done.exit_code == 2
    assert "expected a LoRA, found a checkpoint" in " ".join(done.output.split())


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_lora_weights.bin", "lora/lora.safetensors"])
def test_folders(bench: Any, numbers: Any, tmp_path: Path, name: str) -> None:
    path = tmp_path / "saved" / name
    path.parent.mkdir(parents=True)
    if path.suffix == ".bin":
        torch.save(factors(numbers), path)
    else:
        save_file(factors(numbers), path)
    assert holds_lora(tmp_path / "saved")
    merged = bench.merge(bench.checkpoint(), [tmp_path / "saved"])
    torch.testing.assert_close(merged[f"{Q}.weight"], expected(bench, numbers))


@pytest.mark.parametrize("nested", [False, True])
def test_pickled_base(bench: Any, numbers: Any, tmp_path: Path, nested: bool) -> None:
    """The merged copy is a safetensors file with the names that the networks' programs know."""
    lora = bench.lora(factors(numbers))
    torch.save({"state_dict": bench.weights} if nested else bench.weights, tmp_path / "base.ckpt")
    merge_loras(tmp_path / "base.ckpt", [lora], tmp_path / "merged.safetensors")
    merged = load_file(tmp_path / "merged.safetensors")
    assert merged.keys() == bench.weights.keys()
    torch.testing.assert_close(merged[f"{Q}.weight"], expected(bench, numbers))


def test_pickled_base_in_a_folder(tiny: Path, bench: Any, numbers: Any, tmp_path: Path) -> None:
    weights = load_file(tiny / "model" / "prior" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "prior").mkdir()
    torch.save(weights, tmp_path / "prior" / "diffusion_pytorch_model.bin")
    config = (tiny / "model" / "prior" / "config.json").read_text()
    (tmp_path / "prior" / "config.json").write_text(config)
    lora, forecasts = bench.lora(factors(numbers)), []
    for force in (False, True):
        merge_loras(tmp_path / "prior", [lora], tmp_path / "merged", force=force, on_plan=forecasts.append)
        names = sorted(path.name for path in (tmp_path / "merged").iterdir())
        assert names == ["config.json", "diffusion_pytorch_model.safetensors"]
        assert sorted(file.path for file in forecasts[-1].writes) == names
    merged = load_file(tmp_path / "merged" / "diffusion_pytorch_model.safetensors")
    change = numbers(2, 64, 2) @ numbers(1, 2, 64)
    torch.testing.assert_close(merged[f"{Q}.weight"], weights[f"{Q}.weight"] + change)


@pytest.mark.parametrize("count", [50_000, 19_000])
def test_many_foreign_keys_take_linear_time(tmp_path: Path, count: int) -> None:
    entries = {
        f"lora_unet_{n}.lora_down.weight": {"dtype": "F16", "shape": [1, 1], "data_offsets": [2 * n, 2 * n + 2]}
        for n in range(count)
    }
    text = json.dumps(entries).encode()
    path = tmp_path / "lora.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(2 * count))
    start = time.process_time()
    with pytest.raises(LayoutError, match="not a LoRA for Stable Cascade"):
        open_lora(path)
    assert time.process_time() - start < 10


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32])
def test_factors_of_other_dtypes_are_named(bench: Any, numbers: Any, dtype: torch.dtype) -> None:
    tensors = {**factors(numbers), f"{KEY}.lora_up.weight": torch.ones(64, 2).to(dtype)}
    with pytest.raises(LayoutError, match=r"lora_up.weight: expected a dtype of F16.*found (F8_E4M3|I32)") as caught:
        open_lora(bench.lora(tensors))
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize("axis", ["output", "input"])
def test_comfyui_takes_other_norms_of_dora(bench: Any, numbers: Any, tmp_path: Path, axis: str) -> None:
    """Those of the old weight, where there is a magnitude for each output (comfy/weight_adapter/base.py)."""
    scale = {f"{KEY}.dora_scale": numbers(3, *((64, 1) if axis == "output" else (1, 64))) + 2}
    lora = bench.lora({**factors(numbers), **scale})
    done = convert_lora(lora, tmp_path / "comfyui.safetensors", "comfyui")
    assert any("ComfyUI computes DoRA" in note for note in done.notes) == (axis == "output")
    done = convert_lora(lora, tmp_path / "kohya.safetensors", "kohya")
    assert not done.notes
