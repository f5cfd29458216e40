"""Folders that torchao, bitsandbytes and SDNQ quantised: every weight has the values that the program gives, bit for
bit; bad files get one clear line."""

from pathlib import Path

import pytest
import torch

from cascadekit import convert, inspect
from cascadekit.parity.checkpoints.compare_tensors import compare_checkpoints
from cascadekit.parity.reference.loading import read_tensor
from cascadekit.schemas.stages import Stage
from helpers.quantised import folder, names

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_every_format_is_recorded() -> None:
    assert len(names()) == 20


@pytest.mark.parametrize("name", names())
def test_values_are_those_of_the_program(tmp_path: Path, name: str) -> None:
    values = folder(name, tmp_path / "model")
    prior = inspect(tmp_path / "model").components[Stage.PRIOR]
    assert not prior.problems
    for dtype, cast in DTYPES.items():
        convert(tmp_path / "model", tmp_path / f"{dtype}.safetensors", "split", dtype=dtype)
        again = inspect(tmp_path / f"{dtype}.safetensors").components[Stage.PRIOR]
        found = {key: read_tensor(tensor) for key, tensor in again.tensors.items()}
        assert found.keys() == values.keys()
        differing = [key for key in values if not torch.equal(found[key], values[key].to(cast))]
        assert not differing
    assert all(torch.equal(read_tensor(prior.tensors[key]).float(), values[key].float()) for key in values)
    assert compare_checkpoints(inspect(tmp_path / "model"), inspect(tmp_path / "fp32.safetensors"))
