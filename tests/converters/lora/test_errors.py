"""A LoRA that cannot be read or merged is one clear error: file, key, expected, found, what to try next."""

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cascadekit.converters.lora.convert_lora import convert_lora
from cascadekit.converters.lora.merge_checkpoint import merge_loras
from cascadekit.converters.lora.read_formats import open_lora
from cascadekit.schemas.errors import CascadeError, CheckpointError, ConversionError, LayoutError, UsageError
from helpers.standins import write_stand_in

KEY = "lora_unet_down_blocks_0_2_attention_attn_to_q"
DOWN, UP = f"{KEY}.lora_down.weight", f"{KEY}.lora_up.weight"
HADA = {f"{KEY}.{name}": torch.ones(64, 2) for name in ("hada_w1_a", "hada_w1_b")}
NAN = torch.tensor(float("nan"))

BROKEN: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "no up": ({DOWN: torch.ones(2, 64)}, r"expected lora_down \+ lora_up, found lora_down"),
    "no down": ({UP: torch.ones(64, 2)}, r"expected lora_down \+ lora_up, found lora_up"),
    "half a LoHa": (HADA, r"hada_w2_b, found hada_w1_a \+ hada_w1_b"),
    "two algorithms": ({DOWN: torch.ones(2, 64), **HADA}, "factors of one algorithm, found lora and loha"),
    "alpha alone": ({f"{KEY}.alpha": torch.ones(())}, "found neither"),
    "two ranks": ({DOWN: torch.ones(2, 64), UP: torch.ones(64, 3)}, "one rank, found 3 .* and 2"),
    "rank 0": ({DOWN: torch.ones(0, 64), UP: torch.ones(64, 0)}, "rank is 0"),
    "a vector": ({DOWN: torch.ones(64), UP: torch.ones(64, 1)}, "to be matrices"),
    "other shape": ({DOWN: torch.ones(2, 65), UP: torch.ones(64, 2)}, r"weight \[64, 64\], found those of \[64, 65\]"),
    "integers": ({DOWN: torch.ones(2, 64, dtype=torch.int32), UP: torch.ones(64, 2)}, "expected a dtype of F16"),
    "alpha of two": ({DOWN: torch.ones(2, 64), UP: torch.ones(64, 2), f"{KEY}.alpha": torch.ones(2)}, "single number"),
    "alpha not a number": ({DOWN: torch.ones(2, 64), UP: torch.ones(64, 2), f"{KEY}.alpha": NAN}, "finite number"),
    "DoRA of another shape": (
        {DOWN: torch.ones(2, 64), UP: torch.ones(64, 2), f"{KEY}.dora_scale": torch.ones(3, 1)},
        "DoRA magnitudes",
    ),
    "the same module twice": (
        {name.replace("unet", kind): torch.ones(2, 64) if "down." in name else torch.ones(64, 2)
         for kind in ("unet", "prior_unet") for name in (DOWN, UP)},
        "changes already",
    ),
    "the same factor twice": (
        {DOWN: torch.ones(2, 64), f"{KEY}.lora_A.weight": torch.ones(2, 64), UP: torch.ones(64, 2)},
        "found a second",
    ),
    "unknown ending": ({f"{KEY}.sparkle": torch.ones(2)}, "no part of a LoRA"),
    "another model": (
        {f"lora_unet_input_blocks_4_1_proj_in.lora_{x}.weight": torch.ones(4, 4) for x in ("up", "down")},
        "not a LoRA for Stable Cascade",
    ),
    "no such block": (
        {DOWN: torch.ones(2, 64), UP: torch.ones(64, 2), DOWN.replace("_0_2_", "_0_99_"): torch.ones(2, 64)},
        "down_blocks_0_99_attention_attn_to_q: no such module",
    ),
    "an embedding": ({"clip_g": torch.ones(2, 1280)}, "embedding of OneTrainer"),
    "a list with a gap": (
        {"weights.0.lora_down": torch.ones(2, 64), "weights.1.lora_up": torch.ones(64, 2)},
        "weights.0.lora_up is missing",
    ),
    "a short list": (
        {"weights.0.lora_down": torch.ones(2, 64), "weights.0.lora_up": torch.ones(64, 2)},
        "expected 8 entries, found 1.*\n.*module_filters",
    ),
    "a list among names": ({"weights.0.lora_down": torch.ones(2, 64), "more": torch.ones(1)}, "more"),
    "embeddings without rows": ({"embeddings.embeddings": torch.ones(1, 8)}, "expected both"),
    "negative rows": (
        {"embeddings.embeddings": torch.ones(1, 8), "embeddings.indices": torch.tensor([-1])},
        "rows from 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(bench: Any, name: str) -> None:
    tensors, message = BROKEN[name]
    path = bench.lora(tensors)
    with pytest.raises(LayoutError, match=f"(?s){path.name}.*{message}"):
        bench.merge(bench.checkpoint(), [path])


def test_made_for_the_other_size(bench: Any, catalog_folder: Path, tmp_path: Path) -> None:
    write_stand_in(catalog_folder / "original_stage_c_lite.json", tmp_path / "lite.safetensors", "BF16", holes=True)
    full = bench.lora({DOWN: torch.ones(4, 2048), UP: torch.ones(2048, 4)})
    with pytest.raises(LayoutError) as caught:
        merge_loras(tmp_path / "lite.safetensors", [full], tmp_path / "out.safetensors")
    text = str(caught.value)
    for part in (full.name, KEY, "[1536, 1536]", "[2048, 2048]", "not for the prior (lite)", "fits the prior (full)"):
        assert part in text
    assert open_lora(full).describe() == "kohya, for the prior (full)"
    lite = bench.lora({DOWN: torch.ones(4, 1536), UP: torch.ones(1536, 4)})
    assert open_lora(lite).describe() == "kohya, for the prior (lite)"


@pytest.mark.parametrize(("width", "count", "variant"), [(2048, 128, "full"), (1536, 64, "lite")])
def test_a_list_tells_its_network_by_length_and_shapes(bench: Any, width: int, count: int, variant: str) -> None:
    tensors = {}
    for n in range(count):
        tensors[f"weights.{n}.lora_down"] = torch.ones(1, width)
        tensors[f"weights.{n}.lora_up"] = torch.ones((1, 3)[n % 2] * width, 1)
    lora = open_lora(bench.lora(tensors))
    assert lora.describe() == f"stability, for the prior ({variant})"
    assert len(lora.adapters) == 2 * count


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"PK\x03\x04" + b"x" * 100, "a damaged zip archive"),
        (b"\x80\x02}q\x00." + b"x" * 100, "torch"),
        (b"version https://git-lfs.github.com/spec/v1\n" + b"x" * 80, "Git LFS"),
        (struct.pack("<Q", 10**6) + b"{}", "truncated"),
        (struct.pack("<Q", 2) + b"{}", "holds no tensors"),
    ],
)
def test_no_safetensors_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(content)
    with pytest.raises((CheckpointError, LayoutError), match=f"lora.safetensors.*{message}"):
        open_lora(path)


def test_truncated(bench: Any) -> None:
    path = bench.lora({DOWN: torch.ones(2, 64), UP: torch.ones(64, 2)})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        open_lora(path)


def test_paths(tmp_path: Path, bench: Any) -> None:
    with pytest.raises(UsageError, match="no such file"):
        open_lora(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="adapter_model"):
        open_lora(tmp_path)
    good = bench.lora({DOWN: torch.ones(2, 64), UP: torch.ones(64, 2)})
    with pytest.raises(UsageError, match="one of kohya"):
        convert_lora(good, tmp_path / "x.safetensors", "lycoris")
    with pytest.raises(UsageError, match=r"\.safetensors"):
        merge_loras(bench.checkpoint(), [good], tmp_path / "out")


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"lora_alpha": "8"}', '{"lora_alpha": true}', '{"alpha_pattern": {"x": null}}',
     '{"alpha_pattern": [1]}', "[" * 100_000, '{"alpha_pattern": {"(": 1}}', '{"rank_pattern": {"(.*)*!": 1}}'],
)  # fmt: skip
def test_settings_of_peft_that_are_none(bench: Any, tmp_path: Path, text: str) -> None:
    module = "down_blocks.0.2.attention.to_q"
    path = bench.lora({f"{module}.lora_A.weight": torch.ones(2, 64), f"{module}.lora_B.weight": torch.ones(64, 2)})
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"adapter_config.json: not the settings of a LoRA"):
        open_lora(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_keys_and_shapes_end_well_or_in_our_error(tmp_path: Path, data: st.DataObject) -> None:
    """Files with a well-formed header and nonsense inside."""
    modules = st.sampled_from([KEY, "prior.clf.1", "lora_te_text_projection", "weights.0", "bundle_emb.x", "", "x"])
    endings = st.sampled_from(
        "lora_down.weight lora_up.weight alpha dora_scale hada_w1_a lokr_w1 lokr_t2 lora_mid.weight lora_A.weight "
        "lora_down lora_up clip_g".split()
    )
    shapes = st.lists(st.integers(0, 5), max_size=4)
    names = data.draw(st.lists(st.tuples(modules, endings, shapes), max_size=5, unique_by=lambda item: item[:2]))
    header: dict[str, Any] = {}
    position = 0
    for module, ending, shape in names:
        size = 4 * int(torch.tensor(shape, dtype=torch.int64).prod())
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + size]}
        header[f"{module}.{ending}"] = entry
        position += size
    text = json.dumps(header).encode()
    path = tmp_path / "lora.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(position))
    with contextlib.suppress(CascadeError):
        open_lora(path)


@pytest.mark.parametrize(("dtype", "found"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.float16, "F16")])
def test_weights_with_scales_are_not_merged_into(bench: Any, dtype: torch.dtype, found: str) -> None:
    """ComfyUI multiplies a stored weight by the scale beside it, whatever its dtype."""
    name = "down_blocks.0.0.channelwise.0"
    checkpoint = bench.checkpoint("split", weights=bench.weights | {f"{name}.scale_weight": torch.tensor(2.0)})
    tensors = load_file(checkpoint)
    save_file(tensors | {f"{name}.weight": tensors[f"{name}.weight"].to(dtype)}, checkpoint)
    lora = bench.lora({f"base_model.model.{name}.diff": torch.ones(bench.weights[f"{name}.weight"].shape)})
    with pytest.raises(ConversionError, match=f"found {found} with scales; cast the checkpoint first"):
        merge_loras(checkpoint, [lora], bench.path("merged"))
