"""A verdict is about the model that a bundle was exported from: others are compared with, and change no verdict."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from cascadekit import convert, export
from cascadekit.cli import main
from cascadekit.cli.verify_print import next_steps
from cascadekit.converters.checkpoints.open_model import open_model
from cascadekit.parity.compare import Subject, compare
from cascadekit.parity.results import Report
from cascadekit.parity.same_model import ModelDifference, cause, differences
from cascadekit.schemas.precision import Precision
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import open_bundle


def differing(bundle: Path, model: Path, *stages: Stage) -> list[ModelDifference]:
    return differences(open_bundle(bundle).manifest, open_model([model]), stages)


def found(bundle: Path, model: Path, *stages: Stage) -> list[str]:
    return [each.line for each in differing(bundle, model, *stages)]


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
    assert line == f"prior: exported from {file.name}, this is {file.name}; other weights, dtypes or metadata"
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
    assert not any("no verdict" in line or line.startswith("next:") for line in lines)
    before = (bundle / "cascade.json").read_bytes()
    (verdict,) = json.loads(before)["parity"]
    assert verdict["passed"] is True
    code, lines = verify(bundle, tiny / "original")
    assert code == 1  # compared all the same
    assert lines[0].startswith(f"note: another model than {bundle} was exported from, so no verdict is recorded: vqgan")
    assert lines[-1].startswith("next: compare with the bundle's own model, or export this one: cascadekit export")
    assert (bundle / "cascade.json").read_bytes() == before
    code, lines = verify(bundle, tiny / "original", "--json")
    assert (
        "scale 0.3764, this model's is 0.43"
        in json.loads("\n".join(lines[lines.index("{") :]))["differs_from_exported"][0]
    )


def test_the_cause_is_in_the_first_line(tiny: Path, tmp_path: Path) -> None:
    """The scale alone, the dtype alone; a failure for any other reason ends with what to run next."""
    export(tiny / "model", tmp_path / "scaled", stages=[Stage.VQGAN], vqgan_scale=0.43)
    code, lines = verify(tmp_path / "scaled", tiny / "model")
    assert code == 1
    assert lines[0] == (
        f"note: another VQGAN scale than {tmp_path / 'scaled'} was exported from, so no verdict is recorded: "
        "vqgan: scale 0.43, this model's is 0.3764"
    )
    assert cause(differing(tiny / "bundle", tiny / "original")) == "another model"
    bf16 = tmp_path / "bf16"
    convert(tiny / "model", bf16, "diffusers", dtype="bf16")
    assert cause(differing(tiny / "bundle", bf16)) == "weights of another dtype"


def test_a_failure_says_what_to_run_next() -> None:
    subject = Subject("prior: noise_pred", stage=Stage.PRIOR)
    failed = compare(subject, np.ones((1, 2), np.float32), np.full((1, 2), 2, np.float32), 1e-3)
    steps = list(next_steps(Report("onnxruntime", "cascadekit", (failed,)), Path("my bundle"), Path("model")))
    assert steps[0].endswith("cascadekit validate 'my bundle' --hash")
    assert steps[1].endswith("cascadekit verify 'my bundle' --against model --stage prior --bisect")
    assert not list(next_steps(Report("onnxruntime", "cascadekit"), Path("b"), Path("m")))
    differs = ("vqgan: other weights, dtypes or metadata", "prior: layout original, this is diffusers")
    report = Report("onnxruntime", "cascadekit", (failed,), differs=differs)
    assert next(next_steps(report, Path("b"), Path("m"))).endswith(differs[1])  # of the stage that failed
