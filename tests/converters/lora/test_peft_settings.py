"""Every setting of PEFT is on a list; its patterns are matched as PEFT matches them, and in bounded time."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cascadekit.converters.lora.peft_patterns import Patterns, paths_of
from cascadekit.converters.lora.read_formats import open_lora
from cascadekit.schemas.errors import CheckpointError, LayoutError
from cascadekit.schemas.lora_keys import lora_modules
from cascadekit.schemas.peft_settings import ALPHA_FIELDS, HARMLESS, LIMITED, OFF, UNDERSTOOD
from cascadekit.schemas.stages import PRESETS, Stage, Variant

peft = pytest.importorskip("peft")

Q = "down_blocks.0.2.attention.to_q"
KINDS = {"LORA": "LoraConfig", "LOHA": "LoHaConfig", "LOKR": "LoKrConfig"}


@pytest.fixture
def adapter(bench: Any, tmp_path: Path) -> Any:
    path = bench.lora({f"{Q}.lora_A.weight": torch.ones(2, 64), f"{Q}.lora_B.weight": torch.ones(64, 2)})

    def write(settings: dict[str, Any]) -> Path:
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        return path

    return write


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_on_one_list(kind: str) -> None:
    """A new field of PEFT fails here: read what it does, then put it on a list."""
    fields = {field.name for field in dataclasses.fields(getattr(peft, KINDS[kind]))}
    lists = (UNDERSTOOD, HARMLESS, frozenset(LIMITED), frozenset({ALPHA_FIELDS[kind]}))
    for name in fields:
        assert sum(name in known for known in lists) == 1, name


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_accepted(kind: str) -> None:
    settings = getattr(peft, KINDS[kind])().to_dict()
    for name, limit in LIMITED.items():
        value = settings.get(name)
        assert value in OFF or value in limit.values, name


@pytest.mark.parametrize("name", LIMITED)
def test_other_values_are_refused_with_name_and_value(adapter: Any, name: str) -> None:
    with pytest.raises(LayoutError, match=rf"(?s)adapter_config.json.*{name}: expected .*, found .*unheard") as caught:
        open_lora(adapter({"lora_alpha": 4, name: "unheard"}))
    assert LIMITED[name].why in str(caught.value)


def test_several_are_refused_together(adapter: Any) -> None:
    with pytest.raises(LayoutError, match=r"(?s)init_lora_weights.*pissa.*bias.*all.*tomorrow.*unknown setting"):
        open_lora(adapter({"init_lora_weights": "pissa", "bias": "all", "tomorrow": [1]}))


@pytest.mark.parametrize("kind", ["VERA", ["LORA"], {"a": 1}], ids=str)
def test_another_kind_of_adapter_is_named(adapter: Any, kind: object) -> None:
    with pytest.raises(LayoutError, match=r"peft_type: expected LORA, .* which is not supported; merge it with PEFT"):
        open_lora(adapter({"peft_type": kind}))


def test_dora_without_magnitudes(adapter: Any, bench: Any) -> None:
    with pytest.raises(LayoutError, match="lora_magnitude_vector"):
        bench.merge(bench.checkpoint(), [adapter({"lora_alpha": 4, "use_dora": True})])


PATTERNS = (
    "to_q",
    "q",
    "attention.to_q",
    "^down_blocks.0.2.attention.to_q",
    "^to_q",
    r"down_blocks\..*\.to_q",
    r".*\.2\..*(to_q|to_k)$",
    r"(down|up)_blocks\.1\.\d\..+",
    r"[a-z_]+\.0",
    r"x|embedding\.1",
    "to_",
    "",
    r"(?:up|down)_blocks.*?channelwise\.[04]",
    r".*(?<!to_)q",
)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_as_in_peft(pattern: str) -> None:
    from peft.utils.other import get_pattern_key

    table = {"nothing_of_it": 3.0, pattern: 5.0, "to_q": 7.0}
    ours = Patterns("alpha_pattern", table)
    for module in lora_modules(PRESETS[Stage.PRIOR, Variant.TINY]):
        assert ours.value(module, 1.0) == table.get(get_pattern_key(table, module), 1.0), module


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(.*)*!", "(a|b)*c{2}d{3}", "(.|.)" * 60, "a?" * 30, ".*" * 9, "a" * 501, "(", "*", r"(?P<x"]
)
def test_patterns_without_bound_are_refused(adapter: Any, pattern: str) -> None:
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="alpha_pattern"):
        open_lora(adapter({"alpha_pattern": {pattern: 4}}))
    assert time.monotonic() - start < 5


def test_too_many_patterns_are_refused(adapter: Any) -> None:
    with pytest.raises(CheckpointError, match="at most"):
        open_lora(adapter({"rank_pattern": {f"x{n}": 4 for n in range(5000)}}))


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [("abc", 1), ("a|b|c", 3), ("(a|b)(c|d)", 4), ("a?", 2), ("a*", 64), ("a*?", 64), (r"\*[*+?|]", 1), ("(ab)*c", 64)],
)
def test_paths(pattern: str, paths: int) -> None:
    assert paths_of(pattern) == paths


@pytest.mark.parametrize("prefix", ["prior.", "unet."])
def test_settings_of_several_networks_in_one_table(bench: Any, numbers: Any, prefix: str) -> None:
    table = {f"{prefix}r": 2, f"{prefix}lora_alpha": 6, "text_encoder.r": 2, "text_encoder.lora_alpha": 1}
    layer = "text_model.encoder.layers.0.mlp.fc1"
    tensors = {
        f"{prefix}{Q}.lora_A.weight": numbers(1, 2, 64),
        f"{prefix}{Q}.lora_B.weight": numbers(2, 64, 2),
        f"text_encoder.{layer}.lora_A.weight": numbers(3, 2, 8),
        f"text_encoder.{layer}.lora_B.weight": numbers(4, 32, 2),
    }
    lora = open_lora(bench.lora(tensors, {"lora_adapter_metadata": json.dumps(table)}))
    assert {target.module: adapter.scale for target, adapter in lora.adapters.items()} == {Q: 3.0, layer: 0.5}
