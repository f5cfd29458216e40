"""Merging: dtypes, several LoRAs, unmerging, which bytes stay, files and folders, memory."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cascadekit.converters.lora.merge_checkpoint import merge_loras
from cascadekit.schemas.errors import CascadeError, ConversionError, UsageError
from cascadekit.storage.safetensors_reader import read_header

Q = "down_blocks.0.2.attention.to_q"
KEY = "lora_unet_down_blocks_0_2_attention_attn_to_q"
OTHER = "lora_unet_up_blocks_1_0_channelwise_0"


def pair(bench: Any, numbers: Any, seed: int, key: str = KEY, out: int = 64, inputs: int = 64, rank: int = 4) -> Any:
    down, up = numbers(seed, rank, inputs), numbers(seed + 1, out, rank)
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
    return bench.lora(tensors), up @ down / 2


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_sums_are_made_in_float32_and_rounded_once(bench: Any, numbers: Any, dtype: torch.dtype, layout: str) -> None:
    lora, change = pair(bench, numbers, 1)
    weights = {name: tensor + torch.rand(tensor.shape) for name, tensor in bench.weights.items()}
    merged = bench.merge(bench.checkpoint(layout, dtype, weights), [lora], strengths=[0.25])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, weight in weights.items():
        weight = weight.to(dtype)
        if name == f"{Q}.weight":
            weight = (weight.to(wide) + 0.25 * change.to(wide)).to(dtype)
        assert torch.equal(merged[name], weight), name


def test_several_loras_with_their_strengths(bench: Any, numbers: Any) -> None:
    (one, change_1), (two, change_2) = pair(bench, numbers, 1), pair(bench, numbers, 5)
    three, change_3 = pair(bench, numbers, 9, OTHER, 256, 128)
    merged = bench.merge(bench.checkpoint(), [one, two, three], strengths=[0.5, -0.25, 2])
    assert torch.equal(merged[f"{Q}.weight"], bench.weights[f"{Q}.weight"] + 0.5 * change_1 - 0.25 * change_2)
    name = "up_blocks.1.0.channelwise.0.weight"
    assert torch.equal(merged[name], bench.weights[name] + 2 * change_3)
    with pytest.raises(UsageError, match="one strength for each LoRA"):
        bench.merge(bench.checkpoint(), [one, two, three], strengths=[0.5])
    with pytest.raises(UsageError, match=r"loras: expected paths, found a list of 2; .* strengths=\[0.8\]"):
        bench.merge(bench.checkpoint(), [(one, 0.5)])
    assert torch.equal(bench.merge(bench.checkpoint(), three)[name], bench.weights[name] + change_3)  # one alone


def test_equal_weights_from_either_layout_of_checkpoint(bench: Any, numbers: Any) -> None:
    lora, _ = pair(bench, numbers, 1)
    joined, split = (bench.merge(bench.checkpoint(layout), [lora]) for layout in ("original", "diffusers"))
    assert all(torch.equal(joined[name], split[name]) for name in joined)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_restores_within_the_reported_rounding(bench: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = {
        f"{key}.{part}.weight": torch.randn(shape) / 8
        for key, out, inputs in ((KEY, 64, 64), (OTHER, 256, 128))
        for part, shape in (("lora_down", (3, inputs)), ("lora_up", (out, 3)))
    }
    weights = {name: torch.randn(tensor.shape) / 8 for name, tensor in bench.weights.items()}
    checkpoint, lora = bench.checkpoint(dtype=dtype, weights=weights), bench.lora(tensors)
    merge_loras(checkpoint, [lora], tmp_path / "merged.safetensors", strengths=[0.7])
    done = merge_loras(
        tmp_path / "merged.safetensors", [lora], tmp_path / "back.safetensors", strengths=[0.7], unmerge=True
    )
    before, after = load_file(checkpoint), load_file(tmp_path / "back.safetensors")
    distance = max(float((before[name].double() - after[name].double()).abs().max()) for name in before)
    assert distance <= done.rounding
    unit = torch.finfo(dtype).eps
    assert done.rounding <= 4 * unit * max(float(tensor.abs().max()) for tensor in before.values()) * 2
    assert done.largest_change > 100 * done.rounding or dtype == torch.bfloat16


def test_dora_takes_the_weight_as_the_loras_before_left_it(bench: Any, numbers: Any) -> None:
    plain, change = pair(bench, numbers, 1)
    down, up, scale = numbers(5, 2, 64), numbers(6, 64, 2), numbers(7, 1, 64) + 2
    factors = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": scale}
    dora = bench.lora({f"{KEY}.{name}": tensor for name, tensor in factors.items()})
    before = bench.weights[f"{Q}.weight"].double()

    def decomposed(weight: torch.Tensor) -> torch.Tensor:
        moved = weight + up.double() @ down.double()
        return weight + 0.5 * (scale * moved / moved.norm(dim=0, keepdim=True) - weight)

    first = bench.merge(bench.checkpoint(), [plain, dora], strengths=[1, 0.5])[f"{Q}.weight"]
    last = bench.merge(bench.checkpoint(), [dora, plain], strengths=[0.5, 1])[f"{Q}.weight"]
    torch.testing.assert_close(first.double(), decomposed(before + change), rtol=0, atol=1e-5)
    torch.testing.assert_close(last.double(), decomposed(before) + change, rtol=0, atol=1e-5)


def test_model_folder_with_its_text_encoder(bench: Any, numbers: Any, tmp_path: Path, original: Path) -> None:
    """The text encoder may be named though it lies in the folder, another one may not."""
    lora, change = pair(bench, numbers, 1)
    before = load_file(original / "stage_c.safetensors")["down_blocks.0.2.attention.attn.in_proj_weight"]
    merge_loras(original, [lora], tmp_path / "out", text_encoder=original / "text_encoder")
    after = load_file(tmp_path / "out" / "stage_c.safetensors")["down_blocks.0.2.attention.attn.in_proj_weight"]
    torch.testing.assert_close(after[:64], before[:64] + change)
    assert torch.equal(after[64:], before[64:])
    for name in ("stage_a.safetensors", "stage_b.safetensors", "text_encoder/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (original / name).read_bytes()
    with pytest.raises(UsageError, match="of its own"):
        merge_loras(original, [lora], tmp_path / "other", text_encoder=bench.text_encoder())


def test_dora_cannot_be_unmerged(bench: Any, numbers: Any) -> None:
    tensors = {
        "lora_down.weight": numbers(1, 2, 64),
        "lora_up.weight": numbers(2, 64, 2),
        "dora_scale": numbers(3, 1, 64) + 2,
    }
    path = bench.lora({f"{KEY}.{name}": tensor for name, tensor in tensors.items()})
    with pytest.raises(ConversionError, match="original checkpoint"):
        bench.merge(bench.checkpoint(), [path], unmerge=True)


def test_untouched_bytes_order_and_metadata_stay(bench: Any, numbers: Any, tmp_path: Path) -> None:
    lora, _ = pair(bench, numbers, 1)
    checkpoint = bench.checkpoint()
    merge_loras(checkpoint, [lora], tmp_path / "merged.safetensors", strengths=[0.5])
    old, new = read_header(checkpoint), read_header(tmp_path / "merged.safetensors")
    assert list(old.tensors) == list(new.tensors)
    assert new.metadata["kept"] == "yes"
    assert json.loads(new.metadata["cascadekit.merged_loras"]) == [[lora.name, 0.5, 0.5]]
    a, b = checkpoint.read_bytes(), (tmp_path / "merged.safetensors").read_bytes()
    for name, tensor in old.tensors.items():
        same = a[tensor.offset :][: tensor.nbytes] == b[new.tensors[name].offset :][: tensor.nbytes]
        assert same == (name != "down_blocks.0.2.attention.attn.in_proj_weight"), name


def test_parts_of_a_joined_tensor_keep_their_bytes(bench: Any, numbers: Any, tmp_path: Path) -> None:
    lora, _ = pair(bench, numbers, 1, KEY.replace("to_q", "to_k"))
    weights = {name: tensor.clone() for name, tensor in bench.weights.items()}
    weights[f"{Q}.weight"][0, 0] = float("nan")  # in the rows before those that change
    merged = bench.merge(bench.checkpoint(weights=weights), [lora])
    assert merged[f"{Q}.weight"].numpy().tobytes() == weights[f"{Q}.weight"].numpy().tobytes()


def test_folder_of_a_component(bench: Any, numbers: Any, tmp_path: Path) -> None:
    from cascadekit.schemas.config_json import to_json
    from cascadekit.schemas.stages import PRESETS, Stage, Variant

    lora, change = pair(bench, numbers, 1)
    folder = tmp_path / "model" / "prior"
    folder.mkdir(parents=True)
    shutil.move(bench.checkpoint("diffusers"), folder / "diffusion_pytorch_model.safetensors")
    shutil.copy(folder / "diffusion_pytorch_model.safetensors", folder / "diffusion_pytorch_model.bf16.safetensors")
    (folder / "config.json").write_text(json.dumps(to_json(PRESETS[Stage.PRIOR, Variant.TINY])))
    (tmp_path / "model" / "LICENSE").write_text("terms")
    for source, prior in ((folder, "."), (tmp_path / "model", "prior")):
        out = tmp_path / f"out_{source.name}"
        done = merge_loras(source, [lora], out)
        assert (out / prior / "config.json").read_text() == (folder / "config.json").read_text()
        assert not (out / prior / "diffusion_pytorch_model.bf16.safetensors").exists()
        assert any("bf16" in note for note in done.notes)
        merged = load_file(out / prior / "diffusion_pytorch_model.safetensors")
        assert torch.equal(merged[f"{Q}.weight"], bench.weights[f"{Q}.weight"] + change)
    assert (tmp_path / "out_model" / "LICENSE").read_text() == "terms"


def test_comfyui_file_with_its_text_encoder(bench: Any, numbers: Any, tmp_path: Path) -> None:
    """Both networks lie in one file, the text projection transposed."""
    prior = load_file(bench.checkpoint())
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in prior.items()}
    text = {f"text_encoder.clip_g.transformer.{name}": tensor for name, tensor in bench.text_weights.items()}
    projection = text.pop("text_encoder.clip_g.transformer.text_projection.weight")
    text["text_encoder.clip_g.text_projection"] = projection.T.contiguous()
    save_file({**tensors, **text}, tmp_path / "comfy.safetensors")
    down, up = numbers(1, 2, projection.shape[1]), numbers(2, projection.shape[0], 2)
    lora, change = pair(bench, numbers, 3)
    both = load_file(lora) | {
        "lora_te_text_projection.lora_down.weight": down,
        "lora_te_text_projection.lora_up.weight": up,
    }
    done = merge_loras(tmp_path / "comfy.safetensors", [bench.lora(both)], tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    assert len(done.effects) == 2
    assert torch.equal(merged["text_encoder.clip_g.text_projection"], (projection + up @ down).T)
    joined = prior["down_blocks.0.2.attention.attn.in_proj_weight"].clone()
    joined[:64] += change
    assert torch.equal(merged["model.diffusion_model.down_blocks.0.2.attention.attn.in_proj_weight"], joined)


def test_decoder(tmp_path: Path, bench: Any, numbers: Any, original: Path) -> None:
    down, up = numbers(1, 2, 12), numbers(2, 192, 2)
    lora = bench.lora({"lora_unet_clip_mapper.lora_down.weight": down, "lora_unet_clip_mapper.lora_up.weight": up})
    merge_loras(original / "stage_b.safetensors", [lora], tmp_path / "out.safetensors")
    before, after = load_file(original / "stage_b.safetensors"), load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(after["clip_mapper.weight"], before["clip_mapper.weight"] + up @ down)


def test_stability_embeddings(bench: Any, tmp_path: Path) -> None:
    width = bench.text_weights["text_model.embeddings.token_embedding.weight"].shape[1]
    rows = torch.ones(2, width)
    encoder = bench.text_encoder()
    for indices, applied in (([5, 40000], True), ([5, 49408], False)):
        lora = bench.lora({"embeddings.embeddings": rows, "embeddings.indices": torch.tensor(indices)})
        out = tmp_path / f"out{indices[1]}"
        if not applied:
            with pytest.raises(ConversionError, match="new tokens start from"):
                merge_loras(bench.checkpoint(), [lora], out, text_encoder=encoder)
            continue
        merge_loras(bench.checkpoint(), [lora], out, text_encoder=encoder, strengths=[0.5])
        name = "text_model.embeddings.token_embedding.weight"
        expected = bench.text_weights[name].clone()
        expected[indices] += 0.5
        assert torch.equal(load_file(out / encoder.name)[name], expected)


def test_too_large_for_the_dtype(bench: Any, numbers: Any, tmp_path: Path) -> None:
    lora, _ = pair(bench, numbers, 1)
    with pytest.raises(ConversionError, match="not finite in F16"):
        merge_loras(bench.checkpoint(dtype=torch.float16), [lora], tmp_path / "x.safetensors", strengths=[1e6])
    assert not (tmp_path / "x.safetensors").exists()
    with pytest.raises(UsageError, match="force=True"):
        merge_loras(bench.checkpoint(), [lora], lora)


def test_memory_does_not_grow_with_the_checkpoint(
    tmp_path: Path, bench: Any, numbers: Any, catalog_folder: Path
) -> None:
    """A lite prior of real size as a hole: only one tensor is calculated, a block at a time."""
    import tracemalloc

    from helpers.standins import write_stand_in

    write_stand_in(catalog_folder / "original_stage_c_lite.json", tmp_path / "c.safetensors", "BF16", holes=True)
    down, up = numbers(1, 4, 1536), numbers(2, 6144, 4)
    key = "lora_unet_up_blocks_0_0_channelwise_0"
    lora = bench.lora({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up})
    tracemalloc.start()
    merge_loras(tmp_path / "c.safetensors", [lora], tmp_path / "out.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150e6
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("up_blocks.0.0.channelwise.0.weight"), (up @ down).bfloat16())


def test_a_checkpoint_without_networks_for_loras(original: Path, bench: Any, numbers: Any, tmp_path: Path) -> None:
    lora, _ = pair(bench, numbers, 1)
    with pytest.raises(CascadeError, match="prior"):
        merge_loras(original / "stage_a.safetensors", [lora], tmp_path / "x.safetensors")
    assert np.all([path.suffix != ".partial" for path in tmp_path.iterdir()])
