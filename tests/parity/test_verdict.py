"""Verdicts in a bundle's manifest: what they say, when they are stale, and that old manifests can still be read."""

import json
import math
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from cascadekit.cli import main
from cascadekit.parity.results import Report
from cascadekit.parity.verdict import KEPT, make_verdict, record_verdict, warning
from cascadekit.schemas.errors import CheckpointError
from cascadekit.schemas.manifest import MANIFEST_NAME, parse_manifest, to_text
from cascadekit.schemas.report import Comparison
from cascadekit.schemas.stages import Stage
from cascadekit.schemas.verdicts import Verdict, verdict_of
from cascadekit.storage.bundle import Bundle, open_bundle
from helpers.reports import IMAGE, alone, along, comparison, made_report
from helpers.standins import accept_changes

STAGES = ("text_encoder", "prior", "decoder", "vqgan")


@pytest.fixture
def bundle(tiny: Path, tmp_path: Path) -> Bundle:
    """The tiny bundle without the verdicts that other tests left in it."""
    root = tmp_path / "bundle"
    shutil.copytree(tiny / "bundle", root)
    manifest = open_bundle(root).manifest.model_copy(update={"parity": ()})
    (root / MANIFEST_NAME).write_text(to_text(manifest))
    return open_bundle(root)


def all_stages(error: float = 1e-6) -> tuple[Comparison, ...]:
    return tuple(comparison(alone(stage, "x (batch 1)"), error) for stage in STAGES)


def recorded(bundle: Bundle, run: Report, date: str = "2026-01-31") -> Bundle:
    record_verdict(bundle, make_verdict(run, bundle.manifest, "cascadekit 9", date))
    return open_bundle(bundle.root)


def test_a_manifest_without_verdicts_is_of_a_bundle_never_verified(bundle: Bundle) -> None:
    content = json.loads((bundle.root / MANIFEST_NAME).read_text())
    del content["parity"]  # as exports wrote it before there were any
    old = parse_manifest(json.dumps(content), "old")
    assert verdict_of(old) is Verdict.NEVER
    assert "never verified" in (warning(old) or "")
    command = "cascadekit verify BUNDLE --against MODEL"
    for engine, said in (
        (None, command),
        ("onnxruntime", command),
        ("openvino-bf16", f"{command} --engine openvino-bf16"),
    ):
        assert (warning(old, engine) or "").endswith(said)
    assert old == bundle.manifest


def test_what_is_recorded(bundle: Bundle) -> None:
    run = made_report((*all_stages(), comparison(along("prior", 2), 5e-5)), image_psnr=math.inf)
    manifest = recorded(bundle, run).manifest
    (entry,) = manifest.parity
    assert (entry.engine, entry.reference, entry.date) == ("onnxruntime", "torch", "2026-01-31")
    assert entry.passed
    assert entry.image_psnr_db == math.inf  # through JSON
    assert list(entry.stages) == list(STAGES)
    worst = max(c.relative_l2 for c in run.comparisons if c.stage is Stage.PRIOR)
    assert entry.stages[Stage.PRIOR].worst_relative_l2 == worst
    files = json.loads((bundle.root / MANIFEST_NAME).read_text())["stages"]["prior"]["files"]
    assert entry.stages[Stage.PRIOR].files == {file["path"]: file["fingerprint"] for file in files}
    assert manifest.model_copy(update={"parity": ()}) == bundle.manifest  # nothing else changed
    assert verdict_of(manifest) is verdict_of(manifest, "onnxruntime") is Verdict.PASSED
    assert warning(manifest) is None


@pytest.mark.parametrize(
    "run",
    [
        made_report((*all_stages()[:3], comparison(alone("vqgan", "x"), 0.5))),
        made_report((*all_stages(), comparison(IMAGE, 0.5))),
        made_report(all_stages(), image_psnr=20.0),
    ],
    ids=["a stage", "the image's error", "the image's PSNR"],
)
def test_failures_are_told(bundle: Bundle, run: Report) -> None:
    manifest = recorded(bundle, run).manifest
    assert verdict_of(manifest) is Verdict.FAILED
    assert "failed its parity check on onnxruntime" in (warning(manifest, "onnxruntime") or "")
    assert verdict_of(recorded(open_bundle(bundle.root), made_report(all_stages())).manifest) is Verdict.PASSED


def test_changed_files_make_a_verdict_stale(bundle: Bundle) -> None:
    recorded(bundle, made_report(all_stages()))
    path = bundle.root / MANIFEST_NAME
    text = path.read_text()
    content = json.loads(text)
    fingerprint = content["stages"]["vqgan"]["files"][-1]["fingerprint"]
    content["stages"]["vqgan"]["files"][-1]["fingerprint"] = fingerprint[::-1]
    changed = parse_manifest(json.dumps(content), "changed")
    assert verdict_of(changed) is Verdict.STALE
    assert "changed since it was verified" in (warning(changed) or "")
    # Touched and rewritten files of the same content are the same ones.
    accept_changes(bundle.root)
    assert verdict_of(open_bundle(bundle.root).manifest) is Verdict.PASSED


def test_every_stage_and_every_engine_counts(bundle: Bundle) -> None:
    one = recorded(bundle, made_report(all_stages()[1:2], image_psnr=None))
    assert verdict_of(one.manifest) is Verdict.NEVER  # of three stages
    rest = recorded(one, made_report((*all_stages()[:1], *all_stages()[2:]), image_psnr=None))
    assert verdict_of(rest.manifest) is Verdict.PASSED
    assert len(rest.manifest.parity) == 2
    assert verdict_of(rest.manifest, "openvino-bf16") is Verdict.NEVER
    other = recorded(rest, made_report(all_stages(0.5), engine="openvino-bf16"))
    assert verdict_of(other.manifest, "openvino-bf16") is Verdict.FAILED
    assert verdict_of(other.manifest, "onnxruntime") is Verdict.PASSED
    again = recorded(other, made_report(all_stages()))
    assert [entry.engine for entry in again.manifest.parity] == ["openvino-bf16", "onnxruntime"]


def test_a_manifest_does_not_grow_for_ever(bundle: Bundle) -> None:
    manifest = bundle.manifest
    for number in range(KEPT + 3):
        verdict = make_verdict(made_report(all_stages(), f"e{number}"), manifest, "x")
        manifest = record_verdict(Bundle(bundle.root, manifest), verdict)
    assert len(manifest.parity) == KEPT
    assert manifest.parity[-1].engine == f"e{KEPT + 2}"


def test_a_verdict_recorded_meanwhile_is_kept(bundle: Bundle) -> None:
    """`bundle` was opened before another process recorded its verdict."""
    recorded(bundle, made_report(all_stages(), engine="openvino-bf16"))
    both = recorded(bundle, made_report(all_stages())).manifest
    assert [verdict.engine for verdict in both.parity] == ["openvino-bf16", "onnxruntime"]


def test_a_manifest_that_cannot_be_replaced(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (bundle.root / MANIFEST_NAME).read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(
        CheckpointError, match="No space left on device, so the verdict is not recorded; give verdict=False"
    ):
        recorded(bundle, made_report(all_stages()))
    assert (bundle.root / MANIFEST_NAME).read_bytes() == before
    assert not list(bundle.root.glob(".cascade*"))


def test_the_command_line(bundle: Bundle, tiny: Path, tmp_path: Path) -> None:
    """verify writes reports and verdict, with --no-verdict no verdict; wrong names are told before anything runs."""

    def call(*arguments: object, code: int = 0) -> str:
        command = ["verify", bundle.root, "--against", tiny / "model", *arguments]
        result = CliRunner().invoke(main, [*map(str, command)])
        assert result.exit_code == code, result.output
        return result.output

    before = (bundle.root / MANIFEST_NAME).read_bytes()
    assert "choose a name that ends so" in call("--report", tmp_path / "r.pdf", code=2)
    assert "there is no folder" in call("--report", tmp_path / "absent/r.html", code=2)
    reports = [tmp_path / f"r{suffix}" for suffix in (".html", ".json", ".xml")]
    asked = [argument for path in reports for argument in ("--report", path)]
    call("--stage", "vqgan", "--no-verdict", *asked)
    assert (bundle.root / MANIFEST_NAME).read_bytes() == before
    assert all(path.stat().st_size > 500 for path in reports)
    content = json.loads(reports[1].read_text())
    assert content["environment"].keys() >= {"processor", "python", "numpy", "torch", "onnxruntime"}
    assert {file["role"] for file in content["files"]} == {"bundle", "reference"}
    paths = {file["path"] for file in content["files"]}
    assert paths >= {"vqgan/model.onnx", "vqgan/diffusion_pytorch_model.safetensors"}
    call("--stage", "vqgan")
    (entry,) = open_bundle(bundle.root).manifest.parity
    assert entry.stages.keys() == {Stage.VQGAN}
