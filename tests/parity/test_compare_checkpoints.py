"""Checkpoints of every layout against each other; what was changed in one is found, with safetensors' own writer and
torch's own casts as the truth."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from cascadekit import convert
from cascadekit.cli import main
from cascadekit.converters.checkpoints.open_model import open_model
from cascadekit.parity.checkpoints import compare_values as mapped
from cascadekit.parity.checkpoints.compare_tensors import CheckpointComparison, Status, compare_checkpoints
from cascadekit.schemas.errors import UsageError
from cascadekit.schemas.stages import Stage

PRIOR = "prior/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared") / "model"
    convert([original], folder, "diffusers")
    return folder


@pytest.fixture
def copied(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def compared(found: Path, expected: Path, *stages: Stage) -> CheckpointComparison:
    return compare_checkpoints(open_model([found]), open_model([expected]), stages)


def changed(folder: Path, change: "object", name: str = PRIOR) -> None:
    """Rewrite a weights file with the safetensors library after `change(tensors)`."""
    tensors = load_file(folder / name)
    assert callable(change)
    change(tensors)
    save_file(tensors, folder / name)


def not_equal(result: CheckpointComparison) -> dict[str, Status]:
    return {tensor.name: tensor.status for tensor in result.tensors if tensor.status is not Status.EQUAL}


@pytest.mark.parametrize("layout", ["comfyui", "original"])
def test_any_layout_equals_any_other(original: Path, model: Path, tmp_path: Path, layout: str) -> None:
    convert([model], tmp_path / "out", layout)
    result = compared(tmp_path / "out", model)
    assert result
    assert not not_equal(result)
    assert {Stage.PRIOR, Stage.DECODER, Stage.VQGAN} <= result.layouts.keys()
    assert compared(model, original)


def test_the_mapping_is_what_safetensors_reads(original: Path, model: Path) -> None:
    """Every place that is named holds the very values, as the library itself loads them from both files."""
    result = compared(original, model, Stage.PRIOR, Stage.VQGAN)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for folder in (original, model):
        files |= {f"{folder}/{p.name}": load_file(p) for p in folder.glob("*.safetensors")}
    split = 0
    for tensor in result.tensors:
        assert tensor.found is not None
        source = files[f"{original}/{tensor.found.file}"][tensor.found.name]
        split += tensor.found.rows is not None
        values = source if tensor.found.rows is None else source[slice(*tensor.found.rows)]
        theirs = load_file(model / tensor.stage / "diffusion_pytorch_model.safetensors")[tensor.name]
        assert torch.equal(values, theirs)
        assert tensor.expected is not None
        assert tensor.expected.name == tensor.name
    assert split > 3


def test_one_changed_value_is_found_where_it_is(model: Path, copied: Path) -> None:
    name = "down_blocks.0.0.channelwise.0.weight"
    before = load_file(model / PRIOR)[name]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3, 1] += 0.25
        tensors[name][5, 2] -= 0.5

    changed(copied, change)
    result = compared(copied, model)
    assert not result
    assert not_equal(result) == {name: Status.DIFFERING}
    (found,) = (tensor for tensor in result.tensors if not tensor)
    after = load_file(copied / PRIOR)[name]
    assert (found.differing, found.first) == (2, (3, 1))
    assert found.max_abs == float((after.double() - before.double()).abs().max())


def test_a_changed_bit_that_no_subtraction_shows_is_found(model: Path, copied: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["clf.1.bias"][0] = float("nan")
        tensors["embedding.1.bias"][1] = -0.0

    changed(copied, lambda tensors: tensors["embedding.1.bias"].__setitem__(1, 0.0))
    other = Path(shutil.copytree(copied, copied.with_name("other")))
    changed(other, change)
    result = compared(other, copied)
    found = {tensor.name: tensor for tensor in result.tensors if not tensor}
    assert found.keys() == {"clf.1.bias", "embedding.1.bias"}
    assert found["clf.1.bias"].max_abs == np.inf
    assert found["embedding.1.bias"].max_abs == 0


def test_missing_unexpected_and_misshapen_tensors(model: Path, copied: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["clf.1.bias_renamed"] = tensors.pop("clf.1.bias")
        tensors["embedding.1.bias"] = tensors["embedding.1.bias"][:-1].clone()
        tensors["clf.1.weight"] = tensors["clf.1.weight"].to(torch.int32)

    changed(copied, change)
    result = compared(copied, model)
    assert not_equal(result) == {
        "clf.1.bias": Status.MISSING,
        "clf.1.bias_renamed": Status.UNEXPECTED,
        "embedding.1.bias": Status.SHAPE,
        "clf.1.weight": Status.DTYPE,
    }
    assert result.counts[Status.MISSING] == 1


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_casts_are_told_from_changes(model: Path, tmp_path: Path, dtype: str) -> None:
    convert([model], tmp_path / "half", "original", dtype=dtype)
    for found, expected in ((tmp_path / "half", model), (model, tmp_path / "half")):
        result = compared(found, expected)
        assert result
        assert result.counts[Status.CAST] > 100
    widened = tmp_path / "widened"
    convert([tmp_path / "half"], widened, "diffusers", dtype="F32")
    assert compared(widened, tmp_path / "half")
    assert not compared(widened, model)


def test_rounding_is_torchs(model: Path, copied: Path) -> None:
    """torch's own bf16 is a cast; with one value rounded the other way it is not."""
    name = "down_blocks.0.0.channelwise.0.weight"
    nan = torch.tensor([0x7FA0_0001], dtype=torch.int32).view(torch.float32)  # whose bits torch does not keep
    changed(copied, lambda tensors: tensors[name].view(-1)[5:6].copy_(nan))
    model = Path(shutil.copytree(copied, copied.with_name("float")))
    changed(copied, lambda tensors: tensors.update({n: t.to(torch.bfloat16) for n, t in tensors.items()}))
    assert compared(copied, model, Stage.PRIOR)
    changed(copied, lambda tensors: tensors[name].view(torch.int16)[0, :1].add_(1))
    result = compared(copied, model, Stage.PRIOR)
    assert not_equal(result)[name] is Status.DIFFERING
    (found,) = (tensor for tensor in result.tensors if not tensor)
    assert (found.differing, found.first) == (1, (0, 0))


def test_slices_and_blocks_meet_without_gaps(model: Path, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One value changed, then the last: at the ends of slices of 701 values and of tasks of 5000."""
    monkeypatch.setattr(mapped, "SLICE", 4 * 701)
    monkeypatch.setattr(mapped, "BLOCK", 5000)
    name = "clip_img_mapper.weight"
    before = load_file(copied / PRIOR)
    for at in (0, 700, 701, 4906, 4999, 5000, 196_606):
        tensors = {key: value.clone() if key == name else value for key, value in before.items()}
        tensors[name].view(-1)[at] += 2
        tensors[name].view(-1)[-1] += 1
        save_file(tensors, copied / PRIOR)
        result = compared(copied, model, Stage.PRIOR)
        (found,) = (tensor for tensor in result.tensors if not tensor)
        assert (found.first, found.differing) == (np.unravel_index(at, (256, 768)), 2)
        assert found.max_abs == pytest.approx(2)


def test_shards_and_pickles(model: Path, tmp_path: Path) -> None:
    convert([model], tmp_path / "shards", "diffusers", shard_size=200_000)
    result = compared(tmp_path / "shards", model)
    assert result
    assert len({t.found.file for t in result.tensors if t.found and t.stage is Stage.PRIOR}) > 1
    torch.save(load_file(model / PRIOR), tmp_path / "prior.pt")
    assert compared(tmp_path / "prior.pt", model)


def test_a_transposed_matrix(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip's text projection lies transposed in ComfyUI's files."""
    monkeypatch.setattr(mapped, "SLICE", 4 * 50)
    tensors = load_file(model / "text_encoder/model.safetensors")
    projection = tensors.pop("text_projection.weight")
    tensors = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    prefix = "text_encoder.clip_g."
    saved = {prefix + name: tensor for name, tensor in tensors.items()}
    saved[prefix + "text_projection"] = projection.T.contiguous()
    prior = {f"model.diffusion_model.{name}": t for name, t in load_file(model / PRIOR).items()}
    save_file(saved | prior, tmp_path / "comfy.safetensors")
    result = compared(tmp_path / "comfy.safetensors", model, Stage.TEXT_ENCODER)
    assert result
    (turned,) = (tensor for tensor in result.tensors if tensor.found and tensor.found.transposed)
    assert str(turned.found) == prefix + "text_projection transposed"
    saved[prefix + "text_projection"][2, 5] += 1
    save_file(saved | prior, tmp_path / "comfy.safetensors")
    (found,) = (t for t in compared(tmp_path / "comfy.safetensors", model, Stage.TEXT_ENCODER).tensors if not t)
    assert found.first == (5, 2)


def test_stages_that_only_one_has(original: Path, model: Path) -> None:
    part = compared(original / "stage_c.safetensors", model)
    assert part
    assert {Stage.DECODER, Stage.VQGAN} <= set(part.left_out)
    whole = compared(model, original / "stage_c.safetensors")
    assert not whole
    assert Stage.DECODER in whole.unmatched
    with pytest.raises(UsageError, match="no stage in common"):
        compared(original / "stage_c.safetensors", original / "stage_a.safetensors")


def test_the_command(original: Path, model: Path, copied: Path) -> None:
    def call(*arguments: object) -> "tuple[int, str]":
        result = CliRunner().invoke(main, ["verify", *map(str, arguments)])
        return result.exit_code, result.stdout

    code, text = call(original, "--against", model)
    assert (code, text.splitlines()[-1]) == (0, "equal")
    code, text = call(original, "--against", model, "--stage", "prior", "--mapping")
    assert "in_proj_weight[0:" in text
    code, text = call(original, "--against", model, "--json")
    content = json.loads(text)
    assert content["passed"] is True
    assert content["counts"]["equal"] == len(content["tensors"])
    changed(copied, lambda tensors: tensors["clf.1.bias"].add_(1))
    code, text = call(copied, "--against", original)
    assert code == 1
    assert "clf.1.bias" in text
    assert text.splitlines()[-1] == "NOT equal"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--report r.html --bisect --quiet", "--report, --bisect: for bundles"),
        ("--recorded r.safetensors", "--recorded: for bundles"),
        ("--no-verdict", "--verdict/--no-verdict: for bundles"),
    ],
)
def test_options_for_bundles_are_refused_for_checkpoints(original: Path, options: str, message: str) -> None:
    result = CliRunner().invoke(main, ["verify", str(original), "--against", str(original), *options.split()])
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_checkpoint_is_compared_with_another(original: Path) -> None:
    result = CliRunner().invoke(main, ["verify", str(original)])
    assert result.exit_code == 2
    assert "give --against as the checkpoint that should be equal" in result.stderr
