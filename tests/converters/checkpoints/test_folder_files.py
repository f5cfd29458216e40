"""A folder of single files: every file is read, or named with what it is; only a damaged stage stops a conversion."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from cascadekit import convert
from cascadekit.cli import main
from cascadekit.converters.checkpoints.open_model import open_model
from cascadekit.schemas.errors import CheckpointError, UsageError
from cascadekit.schemas.stages import Stage, Variant


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """stage_a alone, to which each test adds a file."""
    (tmp_path / "files").mkdir()
    shutil.copy(original / "stage_a.safetensors", tmp_path / "files")
    return tmp_path / "files"


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".SAFETENSORS", ".Ckpt", ".sft"])
def test_stages_of_every_suffix_are_read(original: Path, folder: Path, tmp_path: Path, suffix: str) -> None:
    tensors = load_file(original / "stage_c.safetensors")
    if "s" in suffix.lower()[1:2]:
        save_file(tensors, folder / f"stage_c{suffix}")
    else:
        torch.save(tensors, folder / f"stage_c{suffix}")
    convert([folder], tmp_path / "out", "original")
    assert torch.equal(load_file(tmp_path / "out/stage_c.safetensors")["clf.1.bias"], tensors["clf.1.bias"])


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def touch(path: Path) -> None:
    path.write_bytes(b"\0\5\26\7" * 30)


STRAYS: dict[str, tuple[Callable[[Path], object], str]] = {
    "._stage_c.safetensors": (touch, "a Mac's file attributes"),
    ".DS_Store": (touch, "a file browser's settings"),
    ".hidden.safetensors": (touch, "a hidden file"),
    "stage_c.safetensors": (dangling, "a link that leads nowhere"),
    "stage_c.safetensors.part": (touch, "a download that was not finished"),
    "stage_c.safetensors.crdownload": (touch, "a download that was not finished"),
    "optimizer.pt": (touch, "training state"),
    "random_states_0.pkl": (touch, "training state"),
    "cascade.h5": (touch, "weights in a format that is not read here"),
    "pipe.safetensors": (os.mkfifo, "not a regular file"),
    "something.safetensors": (touch, "not a safetensors file"),
    "truncated.ckpt": (lambda path: path.write_bytes(b"PK\3\4" + bytes(50)), "a damaged zip archive"),
}


@pytest.mark.parametrize("name", STRAYS)
def test_strays_are_named_and_stop_nothing(folder: Path, tmp_path: Path, name: str) -> None:
    make, kind = STRAYS[name]
    make(folder / name)
    notes = convert([folder], tmp_path / "out", "original").notes
    assert [note for note in notes if name in note and kind in note], notes


def test_a_damaged_stage_is_not_passed_over(folder: Path, original: Path, tmp_path: Path) -> None:
    whole = (original / "stage_c.safetensors").read_bytes()
    (folder / "stage_c.safetensors").write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"stage_c\.safetensors: truncated.*100 missing"):
        convert([folder], tmp_path / "out", "original")


def test_only_strays_are_refused_by_their_kind(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    save_file({"lora_unet_a.lora_down.weight": torch.zeros(2, 2)}, tmp_path / "files/x.safetensors")
    shown = CliRunner().invoke(main, ["convert", str(tmp_path / "files"), "-o", str(tmp_path / "out"), "--to", "split"])
    assert shown.exit_code == 1
    assert "a LoRA (see `cascadekit lora`)" in " ".join(shown.output.split())


@pytest.mark.parametrize(
    ("options", "dtype", "variant"),
    [
        ({}, "F32", Variant.TINY),
        ({"variant": "bf16"}, "BF16", Variant.TINY),
        ({"variant": "bf16", "lite": True}, "BF16", Variant.LITE),
    ],
)
def test_a_stage_in_several_precisions_and_sizes(
    original: Path, catalog_folder: Path, tmp_path: Path, options: dict[str, Any], dtype: str, variant: Variant
) -> None:
    from helpers.standins import write_stand_in

    tensors = load_file(original / "stage_c.safetensors")
    save_file(tensors, tmp_path / "stage_c.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, tmp_path / "stage_c_bf16.safetensors")
    lite = catalog_folder / "original_stage_c_lite.json"
    write_stand_in(lite, tmp_path / "stage_c_lite_bf16.safetensors", "BF16", holes=True)
    model = open_model([tmp_path], **options)
    prior = model.components[Stage.PRIOR]
    assert set(prior.dtypes) == {dtype}
    assert prior.variant is variant
    assert len([note for note in model.notes if "is left out" in note]) == 2


def test_two_alike_are_still_an_error(original: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        shutil.copy(original / "stage_c.safetensors", tmp_path / f"{name}.safetensors")
    with pytest.raises(UsageError, match="both hold the prior; name one of them"):
        open_model([tmp_path])


def test_components_of_other_names_in_a_folder(original: Path, tmp_path: Path) -> None:
    """One weights file in a component's folder is taken whatever it is called; of several one must be named."""
    (tmp_path / "m/prior").mkdir(parents=True)
    shutil.copy(original / "stage_c.safetensors", tmp_path / "m/prior/my_prior.safetensors")
    assert open_model([tmp_path / "m"]).components.keys() == {Stage.PRIOR}
    shutil.copy(original / "stage_c.safetensors", tmp_path / "m/prior/other.safetensors")
    with pytest.raises(CheckpointError, match=r"no weights.*my_prior\.safetensors, other\.safetensors: name one"):
        open_model([tmp_path / "m"])


def test_shards_of_two_saves(original: Path, tmp_path: Path) -> None:
    """Without an index nothing says which shards belong together but their numbers and names."""
    (tmp_path / "prior").mkdir()
    tensors = list(load_file(original / "stage_c.safetensors").items())
    for number, part in ((1, tensors[:40]), (2, tensors[30:])):
        save_file(dict(part), tmp_path / f"prior/model-0000{number}-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="two shards hold the same tensor"):
        open_model([tmp_path])
    save_file(dict(tensors), tmp_path / "prior/model-00001-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"several saves \(of 2 and of 3\)"):
        open_model([tmp_path])


def test_an_index_says_what_it_leaves_out(original: Path, tmp_path: Path) -> None:
    (tmp_path / "prior").mkdir()
    tensors = load_file(original / "stage_c.safetensors")
    save_file({**tensors, "more": torch.zeros(1)}, tmp_path / "prior/model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (tmp_path / "prior/model.safetensors.index.json").write_text(json.dumps(index))
    notes = open_model([tmp_path]).notes
    assert any(re.search(r"index\.json: does not list 1 .*more.*left out", note) for note in notes), notes
