"""A verdict is about the model that a bundle was exported from: others are compared with, and change no verdict."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from cascadekit import export
from cascadekit.cli import main
from cascadekit.converters.checkpoints.open_model import open_model
from cascadekit.parity.same_model import differences
from cascadekit.schemas.precision import Precision
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import open_bundle


def found(bundle: Path, model: Path, *stages: Stage) -> list[str]:
    return differences(open_bundle(bundle).manifest, open_model([model]), stages)


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny / "model", tmp_path / "model")
    return tmp_path / "model"


def test_casts_and_copies_are_of_the_same_model(tiny: Path, model: Path, tmp_path: Path) -> None:
    assert found(tiny / "bundle", tiny / "model") == []
    assert found(tiny / "bundle", model) == []  # another place
    (file,) = (model / "vqgan").glob("*.safetensors")
    file.touch()
    assert found(tiny / "bundle", model) == []  # another time
    export(model, tmp_path / "fp16", stages=[Stage.VQGAN], precision=Precision.FP16)
    assert found(tmp_path / "fp16", model) == []


def test_what_differs_is_named(tiny: Path, model: Path, tmp_path: Path) -> None:
    (file,) = (model / "prior").glob("*.safetensors")
    tensors = load_file(file)
    tensors["clf.1.weight"] *= 2
    save_file(tensors, file, {"format": "pt"})
    (line,) = found(tiny / "bundle", model)
    assert line == f"prior: exported from {file.name}, this is {file.name}; other weights, or of another dtype"
    cast = ["convert", str(tiny / "model"), "-o", str(tmp_path / "bf16"), "--to", "diffusers", "--dtype", "bf16"]
    assert CliRunner().invoke(main, cast).exit_code == 0
    lines = found(tiny / "bundle", tmp_path / "bf16")
    assert len(lines) == 4
    assert all("32-bit weights, these are 16-bit" in line for line in lines)
    lines = found(tiny / "bundle", tiny / "original")
    assert all("layout diffusers, this is original" in line for line in lines if "text_encoder" not in line)
    assert any(line.startswith("vqgan: scale 0.3764, this model's is 0.43; exported from") for line in lines)
    export(tiny / "model", tmp_path / "scaled", stages=[Stage.VQGAN], vqgan_scale=0.43)
    assert found(tmp_path / "scaled", tiny / "model") == ["vqgan: scale 0.43, this model's is 0.3764"]


def verify(bundle: Path, model: Path, *more: str) -> tuple[int, list[str]]:
    done = CliRunner().invoke(main, ["verify", str(bundle), "--against", str(model), "--stage", "vqgan", *more])
    return done.exit_code, done.output.splitlines()


def test_another_model_changes_no_verdict(tiny: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    export(tiny / "model", bundle, stages=[Stage.VQGAN], weights="copy")
    code, lines = verify(bundle, tiny / "model")
    assert code == 0
    assert not any("not the model" in line for line in lines)
    before = (bundle / "cascade.json").read_bytes()
    (verdict,) = json.loads(before)["parity"]
    assert verdict["passed"] is True
    code, lines = verify(bundle, tiny / "original")
    assert code == 1  # compared all the same
    assert "this is not the model" in lines[0]
    assert (bundle / "cascade.json").read_bytes() == before
    code, lines = verify(bundle, tiny / "original", "--json")
    assert (
        "scale 0.3764, this model's is 0.43"
        in json.loads("\n".join(lines[lines.index("{") :]))["differs_from_exported"][0]
    )
