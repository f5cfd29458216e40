"""PEFT on diffusers' own UNet: its saved adapters merge to its merged weights, ours load into it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableCascadeUNet
from safetensors.torch import load_file, save_file

from cascadekit.converters.lora.convert_lora import convert_lora
from cascadekit.converters.lora.merge_checkpoint import merge_loras
from cascadekit.schemas.config_json import to_json
from cascadekit.schemas.stages import PRESETS, Stage, Variant
from helpers.matrix import Matrix

peft = pytest.importorskip("peft")

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rank 1": {"r": 1, "lora_alpha": 1},
    "odd": {"r": 3, "lora_alpha": 5, "target_modules": [*TARGETS, "kv_mapper.1", "channelwise.0", "clf.1"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 4,
        "rank_pattern": {"to_v": 2},
        "alpha_pattern": {"to_v": 6, "down_blocks.0.2.attention.to_q": 1},
    },
    "patterns that are regular expressions": {
        "r": 4,
        "lora_alpha": 2,
        "rank_pattern": {r"up_blocks\..*": 3, "attention.to_k": 5},
        "alpha_pattern": {
            r"down_blocks\..*\.to_q": 16,
            r"(down|up)_blocks\.1\.2\.attention\.to_k": 12,
            "to_.": 7,
            "q": 99,
        },
    },
    "rank stabilised": {"r": 3, "lora_alpha": 2, "use_rslora": True},
    "dora": {"r": 2, "lora_alpha": 3, "use_dora": True},
    "dora on convolutions": {"r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": ["clf.1", "embedding.1"]},
}


def unet(weights: Path | None = None) -> Any:
    torch.manual_seed(0)
    values = to_json(PRESETS[Stage.PRIOR, Variant.TINY])
    model = StableCascadeUNet(**{key: value for key, value in values.items() if not key.startswith("_")})
    if weights:
        model.load_state_dict(load_file(weights))
    else:
        torch.nn.init.normal_(model.clf[1].weight, std=0.1)
    return model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = unet()
    model.save_pretrained(tmp_path / "prior")
    return tmp_path / "prior"


@pytest.mark.parametrize("name", SETTINGS)
def test_adapter_saved_by_peft(checkpoint: Path, tmp_path: Path, name: str, matrix: Matrix) -> None:
    weights = checkpoint / "diffusion_pytorch_model.safetensors"
    model = peft.get_peft_model(unet(weights), peft.LoraConfig(**{"target_modules": TARGETS, **SETTINGS[name]}))
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_A" in key or "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.2)
        elif "lora_magnitude" in key:
            parameter.data *= torch.rand_like(parameter) + 0.5
    model.save_pretrained(tmp_path / "adapter")
    theirs = model.merge_and_unload().state_dict()
    merge_loras(checkpoint, [tmp_path / "adapter"], tmp_path / "merged")
    _assert_same(load_file(tmp_path / "merged" / weights.name), theirs)
    assert any(not torch.equal(theirs[key], tensor) for key, tensor in load_file(weights).items())

    convert_lora(tmp_path / "adapter", tmp_path / "kohya.safetensors", "kohya")
    merge_loras(checkpoint, [tmp_path / "kohya.safetensors"], tmp_path / "again")
    _assert_same(load_file(tmp_path / "again" / weights.name), theirs)
    convert_lora(tmp_path / "kohya.safetensors", tmp_path / "back", "peft")
    back = peft.PeftModel.from_pretrained(unet(weights), tmp_path / "back").merge_and_unload()
    _assert_same(back.state_dict(), theirs)
    matrix.record("lora peft", "read", by="peft")


def _assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-6, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "bias": ("LoraConfig", {"r": 3, "lora_alpha": 4, "lora_bias": True, "target_modules": ["to_q", "clf.1"]}),
    "LoHa": ("LoHaConfig", {"r": 3, "alpha": 4, "target_modules": ["to_q", "depthwise", "clf.1"]}),
    "LoHa with cores": (
        "LoHaConfig",
        {"r": 2, "alpha": 4, "target_modules": ["depthwise", "clf.1"], "use_effective_conv2d": True},
    ),
    "LoKr": (
        "LoKrConfig",
        {"r": 3, "alpha": 4, "decompose_both": True, "target_modules": ["to_q", "depthwise", "clf.1"]},
    ),
    "LoKr of whole matrices": ("LoKrConfig", {"r": 64, "alpha": 4, "target_modules": ["to_q", "mapper", "clf.1"]}),
}


@pytest.mark.parametrize("name", KINDS)
def test_other_adapters_saved_by_peft(checkpoint: Path, tmp_path: Path, name: str) -> None:
    kind, values = KINDS[name]
    weights = checkpoint / "diffusion_pytorch_model.safetensors"
    model = peft.get_peft_model(unet(weights), getattr(peft, kind)(**values))
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if any(piece in key for piece in ("lora_", "hada_", "lokr_")):
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    theirs = model.merge_and_unload().state_dict()
    merge_loras(checkpoint, [tmp_path / "adapter"], tmp_path / "merged")
    _assert_same(load_file(tmp_path / "merged" / weights.name), theirs)
    assert sum(not torch.equal(theirs[key], tensor) for key, tensor in load_file(weights).items()) > 3


def test_our_folder_is_a_peft_adapter(checkpoint: Path, tmp_path: Path, matrix: Matrix) -> None:
    generator = torch.Generator().manual_seed(2)
    key = "lora_unet_down_blocks_0_2_attention_attn_to_q"
    down, up = torch.randn(3, 64, generator=generator), torch.randn(64, 3, generator=generator)
    save_file(
        {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)},
        tmp_path / "kohya.safetensors",
    )
    convert_lora(tmp_path / "kohya.safetensors", tmp_path / "adapter", "peft")
    model = unet(checkpoint / "diffusion_pytorch_model.safetensors")
    before = model.state_dict()["down_blocks.0.2.attention.to_q.weight"].clone()
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload()
    after = merged.state_dict()["down_blocks.0.2.attention.to_q.weight"]
    torch.testing.assert_close(after, before + up @ down * (2 / 3), rtol=1e-6, atol=1e-5)
    matrix.record("lora peft", "opened", by="peft")
