"""The commands, through the group as it hangs in the command line."""

import json
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from cascadekit.cli.boundary import CascadeGroup
from cascadekit.cli.inspect import inspect
from cascadekit.cli.lora import lora

KEY = "lora_unet_down_blocks_0_2_attention_attn_to_q"


@click.group(cls=CascadeGroup, places={})
def main() -> None:
    """As the real one."""


main.add_command(lora)
main.add_command(inspect)


def run(*arguments: object, code: int = 0) -> Result:
    return invoke("lora", *arguments, code=code)


def invoke(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def file(bench: Any, numbers: Any) -> Path:
    tensors = {
        f"{KEY}.lora_down.weight": numbers(1, 4, 64),
        f"{KEY}.lora_up.weight": numbers(2, 64, 4),
        f"{KEY}.alpha": torch.tensor(2.0),
        "lora_te_text_projection.lora_down.weight": numbers(3, 4, 8),
        "lora_te_text_projection.lora_up.weight": numbers(4, 12, 4),
    }
    path: Path = bench.lora(tensors, {"modelspec.thumbnail": "x" * 5000})
    return path


def test_inspect(file: Path) -> None:
    text = run("inspect", file).output
    for part in (
        "kohya",
        "prior (tiny)",
        "lora (2)",
        "none (1), 2 (1)",
        "down_blocks.0 attention.to_q",
        "5000 characters",
    ):
        assert part in text
    facts = json.loads(run("inspect", file, "--json").stdout)
    assert facts["ranks"] == {"4": 2}
    assert facts["text_encoder_modules"] == 1
    assert facts["targets"] == {"prior: down_blocks.0 attention.to_q": 1, "text_encoder: text_projection": 1}


def test_the_plain_inspect_shows_a_lora_too(file: Path, tmp_path: Path) -> None:
    assert invoke("inspect", file).output == run("inspect", file).output
    (facts,) = json.loads(invoke("inspect", file, "--json").stdout)
    assert facts == {"component": "lora", "passports": [], **json.loads(run("inspect", file, "--json").stdout)}
    folder = tmp_path / "adapter"
    folder.mkdir()
    file.rename(folder / "adapter_model.safetensors")
    assert "down_blocks.0 attention.to_q" in invoke("inspect", folder).output


def test_a_lora_that_fits_no_network_is_refused_as_such(tmp_path: Path) -> None:
    file = tmp_path / "foreign.safetensors"
    save_file({"lora_unet_input_blocks_1.lora_down.weight": torch.ones(4, 8)}, file)
    assert "lora_unet_input_blocks_1" in invoke("inspect", file, code=1).output


def test_convert(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    assert "wrote" in run("convert", file, "--to", "onetrainer", "-o", out).output
    assert "lora_prior_te_text_projection.alpha" in load_file(out)
    text = run("convert", file, "--to", "stability", "-o", out, "--force", code=1).output
    assert "text_projection" in text
    assert "--drop" in text
    assert "left out" in run("convert", file, "--to", "stability", "-o", out, "--force", "--drop").output


def test_merge(bench: Any, numbers: Any, file: Path, tmp_path: Path) -> None:
    checkpoint, out = bench.checkpoint("diffusers"), tmp_path / "out.safetensors"
    result = run("merge", checkpoint, file, file, "-o", out, "--strength", 0.5, "--strength", 0.25)
    assert "1 tensors changed" in result.output
    assert "not applied" in result.output
    name = "down_blocks.0.2.attention.to_q.weight"
    change = numbers(2, 64, 4) @ numbers(1, 4, 64) / 2
    assert torch.equal(load_file(out)[name], bench.weights[name] + 0.75 * change)
    again = tmp_path / "again.safetensors"
    assert "within" in run("merge", out, file, "-o", again, "--strength", 0.75, "--unmerge").output
    torch.testing.assert_close(load_file(again)[name], bench.weights[name])
    assert (
        "one strength"
        in run(
            "merge", checkpoint, file, "-o", tmp_path / "new.safetensors", "--strength", 1, "--strength", 1, code=2
        ).output
    )
    assert "exists already" in run("merge", checkpoint, file, "-o", out, code=2).output
