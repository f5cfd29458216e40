"""`inspect` prints passports for people: a line each, what files share once; --json keeps everything."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

from cascadekit import convert
from cascadekit.cli import main
from cascadekit.converters.checkpoints.example_model import EXAMPLE_MODEL
from cascadekit.schemas.created_by import created_by
from cascadekit.schemas.manifest import Manifest, StageVerdict, VerdictEntry
from cascadekit.schemas.passport_keys import FORMAT, KEY, SLOT
from cascadekit.storage.bundle import open_bundle, update_manifest
from helpers.files import flip

AS_WRITTEN = "every byte is as it was written"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(each) for each in arguments])


def passports(path: Path) -> list[str]:
    """The lines that `inspect` prints about passports."""
    lines = call("inspect", path).stdout.splitlines()
    return lines[next(number for number, line in enumerate(lines) if line.startswith("passport")) :]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("print") / "model"
    convert(EXAMPLE_MODEL, folder, "modular")
    return folder


def test_a_folder(model: Path) -> None:
    first, shared, index, *others = passports(model)
    assert first == f"passports of 9 files: {AS_WRITTEN}"
    assert shared == f"  by {created_by()}, layout modular, dtype F16, copied"
    assert index == "  modular_model_index.json for 18 files without weights from the sources of the others"
    facts = {Path(item["path"]).relative_to(model).as_posix(): item for item in all_facts(model) if item["passport"]}
    assert len(others) == 8 == len(facts) - 1
    for line in others:
        name, source = line.strip().split(" from ")
        (known,) = facts[name]["passport"]["sources"]
        assert source == f"{known['name']} ({known['fingerprint'][:12]})"


def all_facts(path: Path) -> list[dict[str, object]]:
    """Every passport that --json has, once."""
    found = json.loads(call("inspect", path, "--json").stdout)
    return list({state["path"]: state for item in found for state in item["passports"]}.values())


def test_a_changed_file_comes_first(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    path = tmp_path / "model" / "decoder" / "diffusion_pytorch_model.safetensors"
    flip(path, path.stat().st_size - 1, touched=False)
    lines = passports(tmp_path / "model")
    assert lines[0].startswith("passport of decoder/diffusion_pytorch_model.safetensors: changed since it was written")
    assert f"passports of 8 files: {AS_WRITTEN}" in lines
    assert "  modular_model_index.json for 18 files without weights from the sources of the others" in lines


def test_a_file_with_all_facts(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    convert(EXAMPLE_MODEL / "stage_c.safetensors", path, "split", quantize="fp8")
    first, *more = passports(path)
    assert first == f"passport of c.safetensors: {AS_WRITTEN}"
    text = " ".join(" ".join(more).split())
    for fact in (f"by {created_by()}", "layout split", "quantized to FP8", "F8_E4M3", "calculated from stage_c"):
        assert fact in text


def test_nothing_in_a_passport_moves_the_cursor_or_begins_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    passport = {"format": FORMAT, "content": SLOT, "created_by": "x\n\x1b[2Jyes", "sources": [{"name": "\nno"}, 3]}
    save_file(load_file(EXAMPLE_MODEL / "stage_a.safetensors"), path, {KEY: json.dumps(passport)})
    first, *more = passports(path)
    assert first.startswith("passport of a.safetensors: changed since it was written")
    assert all(line.startswith("  ") and "\x1b" not in line for line in more)


def test_a_bundle_says_what_it_was_made_of_and_whether_that_was_proved(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "bundle", tmp_path / "bundle")
    bundle = open_bundle(tmp_path / "bundle")
    source = bundle.manifest.stages["prior"].sources[0]
    shown = " ".join(call("inspect", tmp_path / "bundle").stdout.split())
    assert f"{source.name} ({source.fingerprint[:12]})" in shown
    everything = ", ".join(bundle.manifest.stages)
    assert f"not verified: {everything}; cascadekit verify BUNDLE --against MODEL" in shown

    files = {file.path: file.fingerprint for file in bundle.manifest.stages["prior"].files}
    good = StageVerdict(passed=True, worst_relative_l2=1e-6, files=files)
    entry = VerdictEntry(
        engine="onnxruntime",
        reference="torch",
        date="2026-01-31",
        created_by="this test",
        passed=True,
        image_psnr_db=88.25,
        stages={"prior": good, "decoder": good},
    )
    update_manifest(tmp_path / "bundle", lambda old: Manifest.model_copy(old, update={"parity": (entry,)}))
    shown = " ".join(call("inspect", tmp_path / "bundle").stdout.split())
    assert "verified 2026-01-31: onnxruntime agrees with torch in prior, decoder, image 88.2 dB" in shown
    assert "changed since they were verified: decoder; cascadekit verify" in shown
    others = ", ".join(stage for stage in bundle.manifest.stages if stage not in ("prior", "decoder"))
    assert f"not verified: {others}; cascadekit" in shown
