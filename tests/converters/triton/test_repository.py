"""The command `export-triton`: what it writes, what it replaces, and what it refuses."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cascadekit.cli import main
from cascadekit.schemas.manifest import Manifest
from cascadekit.schemas.precision import Precision
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import update_manifest


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, ["export-triton", *map(str, words)])


@pytest.fixture(scope="module")
def repository(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository") / "new"
    ended = run(bundle, "-o", folder, "--backend", "python")
    assert ended.exit_code == 0, ended.output
    return folder


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_the_index_lists_every_file(repository: Path) -> None:
    index = json.loads((repository / "cascadekit-triton.json").read_text())
    assert sorted(index["files"]) == files(repository)
    assert index["models"] == ["text_encoder", "prior", "decoder", "vqgan", "previewer", "cascade", "cascade_stream"]


def test_a_model_is_a_shell_over_the_package(repository: Path) -> None:
    text = (repository / "cascade" / "1" / "model.py").read_text()
    assert "from cascadekit.runtime.triton.cascade_model import CascadeModel as TritonPythonModel" in text
    assert len(text.splitlines()) < 10


def test_graphs_of_the_onnxruntime_backend_lie_beside_their_weights(bundle: Path, tmp_path: Path) -> None:
    ended = run(bundle, "-o", tmp_path / "new", "--json")
    found = json.loads(ended.stdout)
    assert found["backend"] == "onnxruntime"
    assert {file["path"] for file in found["files"]} == set(files(tmp_path / "new"))
    for stage in ("text_encoder", "prior", "decoder", "vqgan", "previewer"):
        folder = tmp_path / "new" / stage / "1" / "model.onnx"
        assert files(folder) == ["model.onnx", "weights.safetensors"]
        assert (folder / "weights.safetensors").read_bytes() == (bundle / stage / "weights.safetensors").read_bytes()


def test_links_share_the_weights_with_the_bundle(bundle: Path, tmp_path: Path) -> None:
    assert run(bundle, "-o", tmp_path / "new", "--weights", "copy").exit_code == 0
    linked = run(bundle, "-o", tmp_path / "linked", "--weights", "link")
    assert linked.exit_code == 0, linked.output
    place = Path("prior", "1", "model.onnx", "weights.safetensors")
    assert not (tmp_path / "new" / place).samefile(bundle / "prior" / "weights.safetensors")
    shared = (tmp_path / "linked" / place).samefile(bundle / "prior" / "weights.safetensors")
    assert shared or (tmp_path / "linked" / place).stat().st_nlink == 1  # a clone, where the file system has them


def test_a_dry_run_writes_nothing(bundle: Path, tmp_path: Path) -> None:
    ended = run(bundle, "-o", tmp_path / "new", "--dry-run", "--json")
    assert ended.exit_code == 0, ended.output
    planned = json.loads(ended.stdout)
    assert planned["dry_run"] is True
    assert "cascade/config.pbtxt" in {file["path"] for file in planned["writes"]}
    assert not (tmp_path / "new").exists()


def test_force_replaces_a_repository_and_nothing_else(bundle: Path, tmp_path: Path) -> None:
    place = tmp_path / "new"
    assert run(bundle, "-o", place, "--backend", "python").exit_code == 0
    compiled = place / "cascade" / "1" / "__pycache__" / "model.cpython-311.pyc"
    compiled.parent.mkdir()
    compiled.write_bytes(b"left by a server")
    assert "exists already" in run(bundle, "-o", place).output
    assert run(bundle, "-o", place, "--force").exit_code == 0
    assert not compiled.exists()
    assert not (place / "prior" / "1" / "model.py").exists(), "of the earlier backend"
    (place / "prior" / "2").mkdir()
    (place / "prior" / "2" / "mine.onnx").write_bytes(b"mine")
    assert run(bundle, "-o", place, "--force").exit_code == 0
    assert (place / "prior" / "2" / "mine.onnx").read_bytes() == b"mine"


def test_a_bundle_without_a_stage_is_refused(bundle: Path, tmp_path: Path) -> None:
    def leave_out(manifest: Manifest) -> Manifest:
        stages = {stage: entry for stage, entry in manifest.stages.items() if stage is not Stage.VQGAN}
        return manifest.model_copy(update={"stages": stages, "vqgan_scale": None})

    before = (bundle / "cascade.json").read_bytes()
    try:
        update_manifest(bundle, leave_out)
        ended = run(bundle, "-o", tmp_path / "new")
    finally:
        (bundle / "cascade.json").write_bytes(before)
    assert ended.exit_code == 2
    assert "has no vqgan" in ended.output
    assert not (tmp_path / "new").exists()


def test_bf16_graphs_are_refused_on_a_cpu(bundle: Path, tmp_path: Path) -> None:
    def as_bf16(manifest: Manifest) -> Manifest:
        prior = manifest.stages[Stage.PRIOR].model_copy(update={"precision": Precision.BF16})
        return manifest.model_copy(update={"stages": {**manifest.stages, Stage.PRIOR: prior}})

    before = (bundle / "cascade.json").read_bytes()
    try:
        update_manifest(bundle, as_bf16)
        ended = run(bundle, "-o", tmp_path / "new", "--device", "cpu")
        assert run(bundle, "-o", tmp_path / "new", "--device", "cuda", "--dry-run").exit_code == 0
    finally:
        (bundle / "cascade.json").write_bytes(before)
    assert ended.exit_code == 1
    assert "its prior computes in bf16" in ended.output


def test_tensorrt_needs_plans_and_names_the_commands(bundle: Path, tmp_path: Path) -> None:
    before = (bundle / "cascade.json").read_bytes()
    try:
        update_manifest(
            bundle,
            lambda manifest: manifest.model_copy(
                update={"stages": {s: e.model_copy(update={"plans": ()}) for s, e in manifest.stages.items()}}
            ),
        )
        ended = run(bundle, "-o", tmp_path / "new", "--backend", "tensorrt")
    finally:
        (bundle / "cascade.json").write_bytes(before)
    assert ended.exit_code == 1
    words = " ".join(ended.output.split())
    assert "no current tensorrt plan of the whole graph of text_encoder, prior, decoder, vqgan, previewer" in words
    assert "--backend tensorrt --stage prior --graph model" in words
    ended = run(bundle, "-o", tmp_path / "new", "--backend", "tensorrt", "--device", "cpu")
    assert ended.exit_code == 2
