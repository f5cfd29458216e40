"""Every format's keys, written literally, against W + strength * alpha / rank * up @ down in torch."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cascadekit.converters.lora.read_formats import open_lora
from cascadekit.schemas.errors import CascadeError
from cascadekit.schemas.lora_keys import LoraFormat
from cascadekit.schemas.stages import PRESETS, Stage, Variant

# Modules of every kind, by their diffusers names: attention, Linear, 1x1 convolution, timestep mapper.
MODULES = {
    "down_blocks.0.2.attention.to_q": (64, 64),
    "down_blocks.0.2.attention.to_k": (64, 64),
    "up_blocks.1.2.attention.to_v": (64, 64),
    "up_blocks.1.2.attention.to_out.0": (64, 64),
    "down_blocks.1.2.kv_mapper.1": (64, 64),
    "up_blocks.1.0.channelwise.0": (256, 128),
    "down_blocks.0.1.mapper_sca": (128, 64),
    "clip_txt_pooled_mapper": (256, 12),
    "embedding.1": (64, 16, 1, 1),
    "down_downscalers.1.1.blocks.0": (64, 64, 1, 1),
}


def split_original(module: str, out: str = "out_proj") -> str:
    return module.replace("attention.to_out.0", f"attention.attn.{out}").replace("attention.to_", "attention.attn.to_")


def numbered(module: str) -> str:
    for number, part in enumerate(("to_q", "to_k", "to_v")):
        module = module.replace(f"attention.{part}", f"attention.attn.in_proj.{number}")
    return module.replace("attention.to_out.0", "attention.attn.out_proj")


def flat(prefix: str, spell: Callable[[str], str]) -> Callable[[str], str]:
    return lambda module: prefix + spell(module).replace(".", "_")


SPELLINGS: dict[str, tuple[LoraFormat, Callable[[str], str], str, str]] = {
    "kohya": (LoraFormat.KOHYA, flat("lora_unet_", split_original), "lora_down", "lora_up"),
    "kohya before March 2024": (
        LoraFormat.KOHYA,
        flat("lora_unet_", lambda m: split_original(m, "to_out")),
        "lora_down",
        "lora_up",
    ),
    "OneTrainer": (LoraFormat.ONETRAINER, flat("lora_prior_unet_", split_original), "lora_down", "lora_up"),
    "OneTrainer, early": (LoraFormat.ONETRAINER, flat("lora_prior_unet_", str), "lora_down", "lora_up"),
    "OneTrainer, internal": (LoraFormat.ONETRAINER, lambda m: f"lora_prior_unet.{m}", "lora_down", "lora_up"),
    "OneTrainer, original": (LoraFormat.ONETRAINER, lambda m: f"unet.{numbered(m)}", "lora_down", "lora_up"),
    "OneTrainer, original without prefix": (LoraFormat.ONETRAINER, numbered, "lora_A", "lora_B"),
    "OneTrainer, ComfyUI": (LoraFormat.COMFYUI, lambda m: f"diffusion_model.{numbered(m)}", "lora_A", "lora_B"),
    "ComfyUI": (LoraFormat.COMFYUI, lambda m: f"diffusion_model.{split_original(m)}", "lora_down", "lora_up"),
    "LyCORIS": (LoraFormat.LYCORIS, flat("lycoris_", str), "lora_down", "lora_up"),
}


def factors(numbers: Any, rank: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """down [r, in(, 1, 1)] and up [out, r(, 1, 1)] for every module."""
    return {
        module: (numbers(2 * i, rank, *shape[1:]), numbers(2 * i + 1, shape[0], rank, *shape[2:]))
        for i, (module, shape) in enumerate(MODULES.items())
    }


def merged(bench: Any, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], scale: float) -> dict[str, torch.Tensor]:
    result = {}
    for module, (down, up) in pairs.items():
        weight = bench.weights[f"{module}.weight"].double()
        product = up.double().reshape(len(up), -1) @ down.double().reshape(len(down), -1)
        result[module] = weight + scale * product.reshape(weight.shape)
    return result


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_named_formats(bench: Any, numbers: Any, name: str, layout: str) -> None:
    expected_format, spell, a, b = SPELLINGS[name]
    pairs = factors(numbers, 4)
    tensors = {}
    for module, (down, up) in pairs.items():
        key = spell(module)
        tensors |= {f"{key}.{a}.weight": down, f"{key}.{b}.weight": up, f"{key}.alpha": torch.tensor(2.0)}
    path = bench.lora(tensors)
    assert open_lora(path).format is expected_format
    bench.check(path, merged(bench, pairs, 0.5 * 0.5), layout=layout, strengths=[0.5])


@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (3, 7.0), (5, 0.0), (5, None)])
def test_odd_ranks_and_alphas(bench: Any, numbers: Any, rank: int, alpha: float | None) -> None:
    pairs = factors(numbers, rank)
    tensors = {}
    for module, (down, up) in pairs.items():
        key = SPELLINGS["kohya"][1](module)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    scale = alpha / rank if alpha else 1.0
    bench.check(bench.lora(tensors), merged(bench, pairs, -1.25 * scale), 1e-5, strengths=[-1.25])


def test_diffusers_choice_has_no_alpha(bench: Any, numbers: Any) -> None:
    pairs = factors(numbers, 4)
    tensors = {}
    for module, (down, up) in pairs.items():
        tensors |= {f"prior.{module}.lora_A.weight": down, f"prior.{module}.lora_B.weight": up}
    path = bench.lora(tensors)
    assert open_lora(path).format is LoraFormat.DIFFUSERS
    bench.check(path, merged(bench, pairs, 1.0))


@pytest.mark.parametrize("where", ["beside", "inside", "argument", "nowhere"])
def test_peft_settings(bench: Any, numbers: Any, tmp_path: Path, where: str) -> None:
    pairs = factors(numbers, 4)
    tensors = {}
    for module, (down, up) in pairs.items():
        key = f"base_model.model.{module}" if where == "beside" else module
        tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    special = "down_blocks.0.2.attention.to_q"
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "alpha_pattern": {f"^{special}": 2}}
    path = bench.lora(tensors, {"lora_adapter_metadata": json.dumps(settings)} if where == "inside" else None)
    if where == "beside":
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    scale = 2.0 if where != "nowhere" else 1.0
    expected = merged(bench, pairs, scale)
    if where in ("beside", "inside"):
        expected[special] = merged(bench, {special: pairs[special]}, 0.5)[special]
    bench.check(path, expected, alpha=8.0 if where == "argument" else None)
    notes = open_lora(path).notes
    assert any("alpha=" in text for text in notes) == (where in ("argument", "nowhere"))


def test_rank_stabilised_peft(bench: Any, numbers: Any, tmp_path: Path) -> None:
    pairs = factors(numbers, 5)
    path = bench.lora({f"{m}.lora_{x}.weight": t for m, pair in pairs.items() for x, t in zip("AB", pair, strict=True)})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 3, "use_rslora": True}))
    bench.check(path, merged(bench, pairs, 3 / math.sqrt(5)), 1e-5)


def test_stability(bench: Any, numbers: Any, blocks: tuple[str, ...]) -> None:
    """Per attention block out_proj and then the joined in_proj, scale 1 / rank."""
    rank, tensors, expected = 4, {}, {}
    for n, block in enumerate(blocks):
        pairs = [
            (numbers(9 * n, rank, 64), numbers(9 * n + 1, 64, rank)),
            (numbers(9 * n + 2, rank, 64), numbers(9 * n + 3, 192, rank)),
        ]
        for which, (down, up) in enumerate(pairs):
            tensors |= {f"weights.{2 * n + which}.lora_down": down, f"weights.{2 * n + which}.lora_up": up}
        changes = [(pairs[0][1] @ pairs[0][0]) / rank, *((pairs[1][1] @ pairs[1][0]) / rank).chunk(3)]
        for part, change in zip(("to_out.0", "to_q", "to_k", "to_v"), changes, strict=True):
            module = f"{block}.attention.{part}"
            expected[module] = bench.weights[f"{module}.weight"] + change
    path = bench.lora(tensors)
    for layout in ("original", "diffusers"):
        bench.check(path, expected, layout=layout)


def test_stability_list_order_is_torchs(numbers: Any) -> None:
    """The trainer's own loop over modules, on attention as torch builds it."""
    from torch import nn
    from torch.nn.utils import parametrize

    class LoRA(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.target = name

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight

    block = nn.ModuleDict(
        {"attention": nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)}), "kv_mapper": nn.Linear(8, 8)}
    )
    for name, module in block.named_modules():
        if ".attn" in name:
            for parameter in ("weight", "in_proj_weight"):
                if isinstance(getattr(module, parameter, None), nn.Parameter):
                    parametrize.register_parametrization(module, parameter, LoRA(f"{name} {parameter}"), unsafe=True)
                    break
    order = [module.target for module in block.modules() if isinstance(module, LoRA)]
    assert order == ["attention.attn.out_proj weight", "attention.attn in_proj_weight"]


@pytest.mark.parametrize(
    "which", ["original_stage_c", "original_stage_c_lite", "original_stage_b", "original_stage_b_lite"]
)
def test_modules_are_listed_in_the_order_of_registration(catalog_folder: Path, which: str) -> None:
    from cascadekit.schemas.lora_keys import listed_weights

    catalog = json.loads((catalog_folder / f"{which}.json").read_text())["tensors"]
    stage = Stage.PRIOR if "stage_c" in which else Stage.DECODER
    config = PRESETS[stage, Variant.LITE if "lite" in which else Variant.FULL]
    ours = [(entry.name, list(entry.shape)) for entry in listed_weights(config, [""])]
    theirs = []
    for name, spec in catalog.items():
        if len(spec["shape"]) not in (2, 4) or name.endswith(("gamma", "beta")):
            continue
        module = name.removesuffix(".in_proj_weight").removesuffix(".weight")
        # torch's parameters come before those of submodules; the list of LoRAs has it the other way round
        position = len(theirs) - 1 if name.endswith("attn.out_proj.weight") else len(theirs)
        theirs.insert(position, (module, spec["shape"]))
    assert ours == theirs


@pytest.mark.parametrize("filters", [(".attn", "kv_mapper"), ("clip_txt", "downscalers"), ("depthwise",)])
def test_stability_with_another_filter(bench: Any, numbers: Any, filters: tuple[str, ...]) -> None:
    from cascadekit.schemas.lora_keys import listed_weights

    entries = listed_weights(PRESETS[Stage.PRIOR, Variant.TINY], filters)
    tensors, expected = {}, {}
    for n, entry in enumerate(entries):
        down, up = numbers(2 * n, 2, entry.shape[1]), numbers(2 * n + 1, entry.shape[0], 2)
        tensors |= {f"weights.{n}.lora_down": down, f"weights.{n}.lora_up": up}
        kernel = [1] * len(entry.shape[2:])
        for module, change in zip(entry.modules, (up @ down / 2).chunk(len(entry.modules)), strict=True):
            weight = bench.weights[f"{module}.weight"]
            expected[module] = weight + change.reshape(*weight.shape[:2], *kernel)
    bench.check(bench.lora(tensors), expected, module_filters=filters)


def test_text_encoder_keys(bench: Any, numbers: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from cascadekit.converters.lora.merge_checkpoint import merge_loras

    layer = "text_model.encoder.layers.1.self_attn.q_proj"
    spellings = {
        "lora_te_" + layer.replace(".", "_"): layer,
        "lora_prior_te_text_projection": "text_projection",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": "text_model.encoder.layers.0.mlp.fc1",
        "clip_g.text_model.encoder.layers.0.mlp.fc2": "text_model.encoder.layers.0.mlp.fc2",
    }
    tensors, expected = {}, {}
    for n, (key, module) in enumerate(spellings.items()):
        weight = bench.text_weights[f"{module}.weight"]
        down, up = numbers(2 * n, 2, weight.shape[1]), numbers(2 * n + 1, weight.shape[0], 2)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        expected[f"{module}.weight"] = weight + 0.5 * up @ down
    lora, encoder = bench.lora(tensors), bench.text_encoder()
    prior = bench.checkpoint()
    done = merge_loras(
        prior, [lora], tmp_path / "out", strengths=[9.0], text_encoder_strengths=[0.5], text_encoder=encoder
    )
    assert not done.unapplied
    result = load_file(tmp_path / "out" / encoder.name)
    for name, weight in bench.text_weights.items():
        torch.testing.assert_close(result[name], expected.get(name, weight), rtol=0, atol=0)
    assert (tmp_path / "out" / prior.name).read_bytes() == prior.read_bytes()
    with pytest.raises(CascadeError, match="text_encoder="):
        merge_loras(prior, [lora], tmp_path / "nothing.safetensors")
