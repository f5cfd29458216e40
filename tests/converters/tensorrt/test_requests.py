"""A build that cannot work is refused before anything is started, with the words that help."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cascadekit import export
from cascadekit.cli import main
from cascadekit.converters.tensorrt import builder, estimate
from cascadekit.schemas.precision import Precision, Target
from cascadekit.storage.install_hint import install_hint

AGAIN = "export it again: cascadekit export MODEL -o BUNDLE --target tensorrt"


@pytest.fixture(autouse=True)
def nothing_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """No process is started, and nothing written into the bundle."""

    def started(*arguments: Any) -> None:
        pytest.fail("a build was started")

    monkeypatch.setattr(builder, "run_build", started)
    yield
    assert not list(tmp_path.rglob("plans"))
    assert not list(tmp_path.rglob("*.partial"))
    assert not list(tmp_path.rglob(".building"))


def refused(code: int, *arguments: object) -> str:
    """The message, which is all that is said."""
    result = CliRunner().invoke(main, ["build", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert not result.stdout
    assert "Traceback" not in result.stderr
    return str(result.stderr).removeprefix("error: ").strip()


def test_precisions_that_turing_lacks(exported: Callable[[str], Path], tmp_path: Path) -> None:
    stages = "text_encoder, prior, decoder, vqgan: sm75 in tensorrt-rtx"
    words = refused(2, exported("bf16"), "--arch", "sm75,sm89")
    assert words == f"{stages} has no bf16; {AGAIN} --precision fp16 --fp16-safe auto"
    words = refused(2, exported("fp32"), "--arch", "RTX 2080 Ti")
    assert words == f"{stages} has no matrix products in fp32; {AGAIN} --precision fp16 --fp16-safe auto"
    words = refused(2, exported("fp32"), "--arch", "sm75", "--stage", "vqgan")
    assert words.endswith("--target tensorrt --precision fp16")


def test_targets(bundle: Path) -> None:
    assert "--arch sm89 or --arch 'rtx 4090'" in refused(2, bundle)
    assert "sm90: TensorRT-RTX builds for sm75, sm80, sm86, sm89, sm120, sm121 alone" in refused(
        2, bundle, "--arch", "h100"
    )
    assert "'voodoo 2': not a known GPU" in refused(2, bundle, "--arch", "voodoo 2")


def test_fp8(original: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    arguments = f"export {original} -o {bundle} --stage text_encoder --precision bf16 --target tensorrt --quantize fp8"
    assert CliRunner().invoke(main, arguments.split()).exit_code == 0
    words = refused(2, bundle, "--arch", "sm86,sm89")
    assert words == f"text_encoder: sm86 in tensorrt-rtx has no fp8; {AGAIN} --quantize int8"


def test_operators_of_another_runtime(original: Path, tmp_path: Path) -> None:
    export(original, tmp_path / "bundle", weights="copy", precision=Precision.FP16, target=Target.ORT)
    words = refused(2, tmp_path / "bundle", "--arch", "sm89", "--stage", "prior")
    fp16 = "--precision fp16 --fp16-safe auto"
    assert words == f"prior: has operators of ONNX Runtime, which TensorRT does not read; {AGAIN} {fp16}"


def test_stages_and_graphs(bundle: Path) -> None:
    assert "has no previewer" in refused(2, bundle, "--arch", "sm89", "--stage", "previewer")
    words = refused(2, bundle, "--arch", "sm89", "--graph", "steps")
    assert words == "the bundle has no graph steps; it has conditioning, encoder, model, step"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--opt", "1000x1001"), "height 1001: expected a multiple of 8"),
        (("--max", "512x512"), "height: least 512, likeliest 1024, largest 512"),
        (("--static", "512"), "'512': expected WIDTHxHEIGHT or WIDTHxHEIGHTxIMAGES"),
        (("--profile", "512x512:1024x1024"), "expected MIN:OPT:MAX"),
        (("--precision", "fp16"), "--precision and --text-encoder are for the export that -o asks for"),
    ],
)
def test_options(bundle: Path, options: tuple[str, ...], message: str) -> None:
    assert message in refused(2, bundle, "--arch", "sm89", *options)


def test_nothing_is_exported_for_targets_that_cannot_be(original: Path, tmp_path: Path) -> None:
    words = refused(2, original, "-o", tmp_path / "out", "--arch", "sm75,sm89", "--precision", "bf16")
    assert words == "sm75 in tensorrt-rtx has no bf16; use --precision fp16, or make another bundle for that GPU"
    assert not (tmp_path / "out").exists()


def test_too_little_memory(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "free_memory", lambda: 10_000_000)
    words = refused(1, bundle, "--arch", "sm89")
    assert " MB of memory, 10.0 MB are free here" in words
    assert "try it with --no-memory-check" in words


def test_too_little_disk(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(bundle)._replace(free=1_000_000)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda path: usage)
    words = refused(1, bundle, "--arch", "sm89", "--no-memory-check")
    assert " MB of disk, 1.0 MB are free; make room" in words


def test_weights_that_moved(bundle: Path) -> None:
    (bundle / "prior/weights.safetensors").rename(bundle / "weights.safetensors")
    words = refused(1, bundle, "--arch", "sm89", "--stage", "prior")
    assert "prior/weights.safetensors: expected " in words
    assert words.endswith("bytes, it is missing; put it back, or export the model again")
    assert "\n" not in words


def test_a_graph_that_changed(bundle: Path) -> None:
    path = bundle / "vqgan/model.onnx"
    path.write_bytes(path.read_bytes().replace(b"up_blocks.0", b"up_blocks.9"))
    words = refused(1, bundle, "--arch", "sm89", "--stage", "vqgan")
    assert "changed since the export; the bundle is damaged, export it again" in words


def test_no_backend(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    words = refused(1, bundle, "--arch", "sm89")
    assert words == f"tensorrt-rtx is not installed: {install_hint('tensorrt-rtx')}"
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    words = refused(1, bundle, "--backend", "tensorrt")
    assert words == f"tensorrt is not installed: {install_hint('tensorrt')}"
