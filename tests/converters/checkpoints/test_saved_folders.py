"""Folders that diffusers saved, quantised by torchao, bitsandbytes and SDNQ: a conversion without a dtype gives each
tensor as the program dequantises the whole network. tests/data/make_quantised_folders.py made them."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cascadekit import convert, inspect
from cascadekit.schemas.stages import Stage
from helpers.quantised import CONFIG, SAVED, tensor_sha256

KINDS = {
    "torchao_int8": ("torchao Int8Tensor", 43),
    "bitsandbytes_nf4": ("bitsandbytes nf4", 43),
    "bitsandbytes_int8": ("bitsandbytes int8", 43),
    "sdnq_uint4": ("SDNQ uint4", 42),
}


def test_every_folder_is_tested() -> None:
    assert sorted(path.name for path in SAVED.iterdir()) == sorted(KINDS)
    assert sum(path.stat().st_size for path in SAVED.rglob("*") if path.is_file()) < 300_000


@pytest.mark.parametrize("name", KINDS)
def test_tensors_are_those_of_the_program(tmp_path: Path, name: str) -> None:
    kind, count = KINDS[name]
    prior = inspect(SAVED / name).components[Stage.PRIOR]
    assert prior.config == CONFIG
    assert prior.quantised[kind].tensors == count
    done = convert(SAVED / name, tmp_path / "out", "diffusers")
    assert f"prior: {count} weights in {kind} become BF16, as before" in "\n".join(done.notes)
    stored = load_file(tmp_path / "out" / "prior" / "diffusion_pytorch_model.safetensors")
    expected = json.loads((SAVED / name / "values.json").read_text())
    assert stored.keys() == expected.keys()
    assert not [key for key, tensor in stored.items() if tensor_sha256(tensor) != expected[key]]
