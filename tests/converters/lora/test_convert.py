"""Conversions change names and factors but no weight; what a format cannot hold is said, not lost."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cascadekit.converters.lora.convert_lora import convert_lora
from cascadekit.converters.lora.merge_checkpoint import merge_loras
from cascadekit.converters.lora.read_formats import open_lora
from cascadekit.schemas.errors import ConversionError, UsageError
from cascadekit.schemas.lora_keys import LoraFormat

FORMATS = ("kohya", "onetrainer", "comfyui", "peft", "diffusers", "stability")


@pytest.fixture
def kohya(bench: Any, numbers: Any, blocks: tuple[str, ...]) -> Path:
    """Attention of all blocks but one projection, ranks and alphas that differ."""
    tensors = {}
    for n, (block, part) in enumerate(itertools.product(blocks, ("to_q", "to_k", "to_v", "out_proj"))):
        if n == 6:
            continue
        key, rank = f"lora_unet_{block.replace('.', '_')}_attention_attn_{part}", (2, 3)[n % 2]
        tensors |= {
            f"{key}.lora_down.weight": numbers(2 * n, rank, 64),
            f"{key}.lora_up.weight": numbers(2 * n + 1, 64, rank),
            f"{key}.alpha": torch.tensor(float(1 + n % 3)),
        }
    return bench.lora(tensors, {"modelspec.title": "mine", "sshs_model_hash": "stale"})


@pytest.fixture
def stability(bench: Any, numbers: Any) -> Path:
    tensors = {}
    for n in range(8):
        tensors |= {
            f"weights.{n}.lora_down": numbers(2 * n, 4, 64),
            f"weights.{n}.lora_up": numbers(2 * n + 1, (64, 192)[n % 2], 4),
        }
    return bench.lora(tensors)


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 2e-6) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("first", "second"), list(itertools.product(FORMATS, FORMATS)))
def test_two_conversions_in_a_row(bench: Any, kohya: Path, tmp_path: Path, first: str, second: str) -> None:
    convert_lora(kohya, tmp_path / "1.safetensors", first)
    convert_lora(tmp_path / "1.safetensors", tmp_path / "2.safetensors", second)
    checkpoint = bench.checkpoint()
    expected = bench.merge(checkpoint, [kohya])
    for name in ("1", "2"):
        assert_same_weights(bench.merge(checkpoint, [tmp_path / f"{name}.safetensors"]), expected)


@pytest.mark.parametrize("to", ["kohya", "onetrainer", "comfyui", "peft"])
def test_factors_are_copied_bit_for_bit(kohya: Path, tmp_path: Path, to: str) -> None:
    convert_lora(kohya, tmp_path / "out.safetensors", to)
    convert_lora(tmp_path / "out.safetensors", tmp_path / "back.safetensors", "kohya")
    before, after = load_file(kohya), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_stability_to_named_and_back_keeps_rank_and_values(stability: Path, tmp_path: Path) -> None:
    """q, k and v have one lora_down between them, so they become one entry of the old rank again."""
    convert_lora(stability, tmp_path / "named.safetensors", "kohya")
    named = load_file(tmp_path / "named.safetensors")
    before = load_file(stability)
    for part, rows in zip(("to_q", "to_k", "to_v"), before["weights.1.lora_up"].chunk(3), strict=True):
        key = f"lora_unet_down_blocks_0_2_attention_attn_{part}"
        assert torch.equal(named[f"{key}.lora_up.weight"], rows)
        assert torch.equal(named[f"{key}.lora_down.weight"], before["weights.1.lora_down"])
        assert named[f"{key}.alpha"] == 1
    convert_lora(tmp_path / "named.safetensors", tmp_path / "back.safetensors", "stability")
    after = load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_q_k_and_v_of_their_own_become_block_diagonal(bench: Any, numbers: Any, tmp_path: Path) -> None:
    key, tensors, pairs = "lora_unet_down_blocks_0_2_attention_attn_", {}, []
    for n, part in enumerate(("to_q", "to_k", "to_v")):
        down, up = numbers(2 * n, 2, 64), numbers(2 * n + 1, 64, 2)
        pairs.append((down, up))
        tensors |= {f"{key}{part}.lora_down.weight": down, f"{key}{part}.lora_up.weight": up}
        tensors[f"{key}{part}.alpha"] = torch.tensor(4.0)
    convert_lora(bench.lora(tensors), tmp_path / "out.safetensors", "stability")
    out = load_file(tmp_path / "out.safetensors")
    # alpha / rank is 2 and the trainer divides by the joined rank 6: up times 12
    assert torch.equal(out["weights.1.lora_down"], torch.cat([down for down, _ in pairs]))
    assert torch.equal(out["weights.1.lora_up"], 12 * torch.block_diag(*(up for _, up in pairs)))
    assert out["weights.0.lora_down"].shape == (6, 64)
    assert all(not out[name].any() for name in out if ".1." not in name)


@pytest.mark.parametrize("to", ["kohya", "comfyui", "onetrainer", "diffusers", "peft"])
def test_convolutions_and_text_encoder(bench: Any, numbers: Any, tmp_path: Path, to: str) -> None:
    layer = "text_model_encoder_layers_0_mlp_fc1"
    tensors = {
        "lora_unet_embedding_1.lora_down.weight": numbers(1, 3, 16, 1, 1),
        "lora_unet_embedding_1.lora_up.weight": numbers(2, 64, 3, 1, 1),
        f"lora_te_{layer}.lora_down.weight": numbers(3, 3, 8),
        f"lora_te_{layer}.lora_up.weight": numbers(4, 32, 3),
        f"lora_te_{layer}.alpha": torch.tensor(1.0),
    }
    path = bench.lora(tensors)
    if to == "peft":
        with pytest.raises(ConversionError, match="text encoder"):
            convert_lora(path, tmp_path / "out.safetensors", to)
        done = convert_lora(path, tmp_path / "out.safetensors", to, drop=True)
        assert any("left out" in note and "mlp.fc1" in note for note in done.notes)
        return
    convert_lora(path, tmp_path / "out.safetensors", to)
    encoder, prior = bench.text_encoder(), bench.checkpoint()
    folders = (tmp_path / "a", tmp_path / "b")
    for lora, folder in zip((path, tmp_path / "out.safetensors"), folders, strict=True):
        merge_loras(prior, [lora], folder, text_encoder=encoder)
    for name in (prior.name, encoder.name):
        assert_same_weights(*(load_file(folder / name) for folder in folders))


def test_half_precision_factors(bench: Any, kohya: Path, tmp_path: Path) -> None:
    """Copied where alpha is kept, multiplied in F32 where it is folded in."""
    half = bench.lora({name: tensor.half() for name, tensor in load_file(kohya).items()})
    dtypes = {}
    for to in ("comfyui", "diffusers"):
        convert_lora(half, tmp_path / f"{to}.safetensors", to)
        assert_same_weights(
            *(bench.merge(bench.checkpoint(), [path]) for path in (half, tmp_path / f"{to}.safetensors"))
        )
        dtypes[to] = {name[-8:]: tensor.dtype for name, tensor in load_file(tmp_path / f"{to}.safetensors").items()}
    assert dtypes["comfyui"]["p.weight"] == torch.float16
    assert torch.float32 in dtypes["diffusers"].values()


@pytest.mark.parametrize(
    ("to", "reason"),
    [
        ("peft", "loha"),
        ("diffusers", "loha"),
        ("stability", "loha"),
        ("kohya", ""),
        ("comfyui", ""),
        ("onetrainer", ""),
    ],
)
def test_loha(bench: Any, numbers: Any, tmp_path: Path, to: str, reason: str) -> None:
    shapes = {"hada_w1_a": (256, 2), "hada_w1_b": (2, 128), "hada_w2_a": (256, 2), "hada_w2_b": (2, 128)}
    key = "lora_unet_up_blocks_1_0_channelwise_0"
    path = bench.lora({f"{key}.{name}": numbers(n, *shape) for n, (name, shape) in enumerate(shapes.items())})
    if reason:
        for drop in (False, True):  # there is nothing to write without it
            with pytest.raises(ConversionError, match=reason):
                convert_lora(path, tmp_path / "out.safetensors", to, drop=drop)
        return
    convert_lora(path, tmp_path / "out.safetensors", to)
    checkpoint = bench.checkpoint()
    assert_same_weights(*(bench.merge(checkpoint, [lora]) for lora in (path, tmp_path / "out.safetensors")))


@pytest.mark.parametrize("axis", ["input", "output"])
@pytest.mark.parametrize("to", FORMATS)
def test_dora(bench: Any, numbers: Any, tmp_path: Path, to: str, axis: str) -> None:
    tensors = {}
    for key, out, inputs, ones in (
        ("embedding_1", 64, 16, (1, 1)),
        ("down_blocks_0_2_attention_attn_to_q", 64, 64, ()),
    ):
        spread = (1, inputs, *ones) if axis == "input" else (out, 1, *ones)
        tensors |= {
            f"lora_unet_{key}.lora_down.weight": numbers(1, 2, inputs, *ones),
            f"lora_unet_{key}.lora_up.weight": numbers(2, out, 2, *ones),
            f"lora_unet_{key}.dora_scale": numbers(3, *spread) + 2,
        }
    path = bench.lora(tensors)
    if to in ("diffusers", "stability") or (to == "peft" and axis == "input"):
        with pytest.raises(ConversionError, match="DoRA"):
            convert_lora(path, tmp_path / "out.safetensors", to)
        return
    convert_lora(path, tmp_path / "out.safetensors", to)
    checkpoint = bench.checkpoint()
    assert_same_weights(*(bench.merge(checkpoint, [lora]) for lora in (path, tmp_path / "out.safetensors")))


def test_stability_holds_attention_only(bench: Any, numbers: Any, kohya: Path, tmp_path: Path) -> None:
    tensors = load_file(kohya) | {
        "lora_unet_clip_txt_mapper.lora_down.weight": numbers(1, 2, 8),
        "lora_unet_clip_txt_mapper.lora_up.weight": numbers(2, 64, 2),
    }
    path = bench.lora(tensors)
    with pytest.raises(ConversionError, match=r"clip_txt_mapper: not among the modules matching \.attn"):
        convert_lora(path, tmp_path / "out.safetensors", "stability")
    filters = (".attn", "clip_txt_mapper")
    convert_lora(path, tmp_path / "out.safetensors", "stability", module_filters=filters)
    expected = bench.merge(bench.checkpoint(), [path])
    result = bench.merge(bench.checkpoint(), [tmp_path / "out.safetensors"], module_filters=filters)
    assert_same_weights(result, expected)


def test_embeddings_have_a_place_in_their_own_format_only(bench: Any, kohya: Path, tmp_path: Path) -> None:
    bundle = {"bundle_emb.<mine>.clip_g": torch.ones(2, 8), "bundle_emb.<mine>.clip_g_out": torch.ones(2, 8)}
    named = bench.lora(
        {name.replace("lora_unet", "lora_prior_unet"): t for name, t in load_file(kohya).items()} | bundle
    )
    lora = open_lora(named)
    assert lora.format is LoraFormat.ONETRAINER
    assert [(e.name, e.output) for e in lora.embeddings] == [("<mine>", False), ("<mine>", True)]
    convert_lora(named, tmp_path / "same.safetensors", "onetrainer")
    assert bundle.keys() <= load_file(tmp_path / "same.safetensors").keys()
    with pytest.raises(ConversionError, match="<mine>"):
        convert_lora(named, tmp_path / "out.safetensors", "kohya")
    done = merge_loras(bench.checkpoint(), [named], tmp_path / "merged.safetensors")
    assert any("<mine>" in text for text in done.unapplied)


def test_metadata(kohya: Path, tmp_path: Path) -> None:
    expected = {"kohya": "stable-cascade/lora", "onetrainer": "stable-cascade-v1-prior/lora", "diffusers": None}
    for to, architecture in expected.items():
        convert_lora(kohya, tmp_path / f"{to}.safetensors", to)
        with safe_open(tmp_path / f"{to}.safetensors", "pt") as file:
            metadata = file.metadata()
        assert metadata["modelspec.title"] == "mine"
        assert metadata.get("modelspec.architecture") == architecture
        assert "sshs_model_hash" not in metadata


def test_peft_as_a_folder(bench: Any, kohya: Path, tmp_path: Path) -> None:
    convert_lora(kohya, tmp_path / "adapter", "peft")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert len(settings["target_modules"]) == 15
    assert open_lora(tmp_path / "adapter").format is LoraFormat.PEFT
    assert_same_weights(*(bench.merge(bench.checkpoint(), [path]) for path in (kohya, tmp_path / "adapter")))
    with pytest.raises(UsageError, match=r"\.safetensors"):
        convert_lora(kohya, tmp_path / "other", "kohya")
