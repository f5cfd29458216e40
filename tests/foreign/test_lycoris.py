"""LyCORIS writes LoRAs for the example model's prior: merged by us, they compute what LyCORIS's layers compute."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cascadekit import convert
from cascadekit.converters.checkpoints.example_model import EXAMPLE_MODEL
from cascadekit.converters.lora.merge_checkpoint import merge_loras
from helpers.matrix import Matrix
from helpers.oracles import QUANTISERS, quantiser, run_alone


@pytest.mark.slow
@pytest.mark.skipif(not quantiser("lycoris_lora"), reason=f"{QUANTISERS}: no lycoris_lora; `make matrix` installs it")
def test_merged_as_lycoris_computes(tmp_path: Path, matrix: Matrix) -> None:
    prior = tmp_path / "model" / "prior"
    convert(EXAMPLE_MODEL, tmp_path / "model", "diffusers", dtype="fp32")
    run_alone("foreign.lycoris_alone", prior, tmp_path / "theirs", path=QUANTISERS)
    before = load_file(prior / "diffusion_pytorch_model.safetensors")
    errors = []
    merged = [*(tmp_path / "theirs").glob("*_merged.safetensors")]
    assert len(merged) == 4
    for path in merged:
        algorithm = path.name.removesuffix("_merged.safetensors")
        theirs = load_file(path)
        merge_loras(prior, [path.with_name(f"{algorithm}.safetensors")], tmp_path / algorithm)
        ours = load_file(tmp_path / algorithm / "diffusion_pytorch_model.safetensors")
        assert ours.keys() == theirs.keys() == before.keys()
        changed = [name for name in before if not torch.allclose(theirs[name], before[name], rtol=1e-3, atol=1e-4)]
        assert len(changed) > 40, algorithm
        for name in before:
            difference = theirs[name] - before[name] if name in changed else before[name]
            errors.append(float((ours[name] - theirs[name]).norm() / difference.norm()))
    assert max(errors) < 1e-5
    matrix.record("lora lycoris", "read", by="lycoris_lora", version=quantiser("lycoris_lora"))
    matrix.record("lora lycoris", "error", max(errors), by="lycoris_lora", version=quantiser("lycoris_lora"))
