"""The website as files: a bundle of what the page needs, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cascadekit import Cascade, UsageError, export, validate
from cascadekit.cli import main
from cascadekit.converters.checkpoints.example_model import EXAMPLE_MODEL
from cascadekit.converters.export.export_options import ExportOptions
from cascadekit.converters.site import write_site as module
from cascadekit.converters.site.onnxruntime_web import FILES
from cascadekit.converters.site.write_site import write_site
from cascadekit.schemas.manifest import MANIFEST_NAME, StageVerdict, VerdictEntry
from cascadekit.schemas.stages import Stage
from cascadekit.schemas.verdicts import Verdict, verdict_of
from cascadekit.storage.bundle import open_bundle, update_manifest
from cascadekit.storage.safetensors_reader import read_header
from helpers.npm import packed

STAGES = {Stage.TEXT_ENCODER, Stage.PRIOR, Stage.DECODER, Stage.VQGAN}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("npm") / "package.tgz")


def test_the_website_is_a_sound_bundle_of_four_stages_in_fp16(site_bundle: Path, package: Path, tmp_path: Path) -> None:
    manifest = write_site(site_bundle, tmp_path / "site", package)
    assert set(manifest.stages) == STAGES
    assert [list(entry.graphs) for entry in manifest.stages.values()] == [["model"]] * 4
    checked = validate(tmp_path / "site", hash=True)
    assert checked, checked
    files = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*.*")}
    assert {"index.html", "worker.js", f"onnxruntime-web/{FILES[0]}", "tokenizer/tokenizer.json"} < files
    weights = list((tmp_path / "site").rglob("*.safetensors"))
    assert {tensor.dtype for path in weights for tensor in read_header(path).tensors.values()} <= {"F16", "I64"}


def test_the_runtime_generates_the_same_image_from_it(site_bundle: Path, package: Path, tmp_path: Path) -> None:
    write_site(site_bundle, tmp_path / "site", package.parent / "package")
    images = []
    for folder in (site_bundle, tmp_path / "site"):
        with Cascade.open(folder, engine="onnxruntime", threads=1) as cascade:
            result = cascade.generate("a fox", seed=3, width=64, height=72, prior_steps=2, decoder_steps=1)
            images.append(np.asarray(result.images[0]))
    np.testing.assert_array_equal(*images)


def test_one_changed_byte_of_the_page_shows(site_bundle: Path, package: Path, tmp_path: Path) -> None:
    write_site(site_bundle, tmp_path / "site", package)
    script = tmp_path / "site" / "noise.js"
    script.write_bytes(script.read_bytes().replace(b"24", b"25", 1))
    assert not validate(tmp_path / "site")


def test_a_website_is_replaced_whole_and_nothing_else_is(site_bundle: Path, package: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    write_site(site_bundle, site, package)
    with pytest.raises(UsageError, match="exists already"):
        write_site(site_bundle, site, package)
    write_site(site_bundle, site, package, force=True)
    assert validate(site, hash=True)
    with pytest.raises(UsageError):
        write_site(site, site, package, force=True)


def test_a_verdict_on_the_bundle_holds_for_the_website(site_bundle: Path, package: Path, tmp_path: Path) -> None:
    entries = open_bundle(site_bundle).manifest.stages
    stages = {
        stage: StageVerdict(
            passed=True, worst_relative_l2=0.0, files={file.path: file.fingerprint for file in entry.files}
        )
        for stage, entry in entries.items()
    }
    verdict = VerdictEntry(
        engine="onnxruntime",
        reference="cascadekit",
        date="2026-01-31",
        created_by="cascadekit",
        passed=True,
        image_psnr_db=80.0,
        stages=stages,
    )
    verified = tmp_path / "bundle"
    shutil.copytree(site_bundle, verified)
    update_manifest(verified, lambda manifest: manifest.model_copy(update={"parity": (verdict,)}))
    assert verdict_of(write_site(verified, tmp_path / "site", package)) is Verdict.PASSED


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (ExportOptions(stages=[Stage.PRIOR, Stage.DECODER, Stage.VQGAN]), "has no text_encoder"),
        (ExportOptions(precisions={Stage.DECODER: "bf16"}), "its decoder computes in bf16.*--precision decoder=fp32"),
    ],
)
def test_what_no_browser_runs(package: Path, tmp_path: Path, options: ExportOptions, said: str) -> None:
    export(EXAMPLE_MODEL, tmp_path / "bundle", options)
    with pytest.raises(UsageError, match=said):
        write_site(tmp_path / "bundle", tmp_path / "site", package)
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize(
    ("limit", "said"),
    [("MAX_FILE_BYTES", r"text_encoder/.*: 0\.00 GB; expected at most"), ("MAX_MEMORY", "weights of its text_encoder")],
)
def test_what_is_too_large(
    site_bundle: Path, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, said: str
) -> None:
    monkeypatch.setattr(module, limit, 1000)
    with pytest.raises(UsageError, match=said):
        write_site(site_bundle, tmp_path / "site", package)


def test_other_packages_are_refused(site_bundle: Path, tmp_path: Path) -> None:
    def folder(name: str) -> Path:
        (tmp_path / name).mkdir()
        return tmp_path / name / "package.tgz"

    broken = tmp_path / "broken.tgz"
    broken.write_bytes(b"\x1f\x8b and no more")
    given = {
        "not the package onnxruntime-web": packed(folder("a"), name="onnxruntime-node"),
        rf"has no dist/{FILES[1]}": packed(folder("b"), files=FILES[:1]),
        "broken.tgz: cannot be read": broken,
        "nothing.tgz: cannot be read": tmp_path / "nothing.tgz",
    }
    for said, path in given.items():
        with pytest.raises(UsageError, match=said) as caught:
            write_site(site_bundle, tmp_path / "site", path)
        assert "npm pack onnxruntime-web" in str(caught.value)


def test_a_tokenizer_with_further_tokens_is_refused(site_bundle: Path, package: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    write_site(site_bundle, site, package)
    path = site / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
    content["added_tokens"].append({"id": 49408, "content": "<cat>", "normalized": True, **flags})
    path.write_text(json.dumps(content))
    manifest = json.loads((site / MANIFEST_NAME).read_text())
    manifest["stages"]["text_encoder"]["config"]["vocab_size"] = 49409
    (site / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="1 tokens beside CLIP's, such as '<cat>'"):
        write_site(site, tmp_path / "other", package)


def test_the_command_says_what_it_wrote(site_bundle: Path, package: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    arguments = ["site", str(site_bundle), "-o", str(site), "--onnxruntime-web", str(package), "--json"]
    facts = json.loads(CliRunner().invoke(main, arguments, catch_exceptions=False).stdout)
    sizes = [path.stat().st_size for path in site.rglob("*.*")]
    assert facts["files"] == len(sizes)
    assert facts["bytes"] == sum(sizes) - (site / MANIFEST_NAME).stat().st_size
