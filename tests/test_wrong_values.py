"""Wrong values of the arguments of public functions: each is refused at once, by the argument's name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cascadekit import BuildOptions, ExportOptions, compare_checkpoints, verify
from cascadekit.schemas.choices import stages_of
from cascadekit.schemas.errors import UsageError
from cascadekit.schemas.stages import Stage


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ({"engine": "abacus"}, "engine='abacus': expected one of onnxruntime"),
        ({"reference": "abacus"}, "reference='abacus': expected one of cascadekit, diffusers"),
        ({"reference_precision": "fp8"}, "reference_precision='fp8': expected one of fp64"),
        ({"reference_device": "tpu"}, "reference_device='tpu': expected one of cpu, cuda"),
        ({"sizes": "large"}, "sizes='large': expected one of small, all"),
        ({"size": (64,)}, r"size=\(64,\): expected \(width, height\)"),
        ({"stages": ["vae"]}, "stages='vae': expected one of text_encoder"),
    ],
)
def test_of_verify(tiny: Path, argument: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        verify(tiny / "bundle", tiny / "model", **argument)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: ExportOptions(fp16_safe="yes"), 'fp16_safe=\'yes\': expected "auto", "off", or 0 to 12'),
        (lambda: ExportOptions(fp16_safe=13), "fp16_safe=13: expected"),
        (lambda: ExportOptions(loras=["style.safetensors"]), "loras='style.safetensors': expected a file and"),
        (lambda: ExportOptions(loras="style.safetensors"), "loras='style.safetensors': expected a file and"),
        (lambda: ExportOptions(loras=[0.8]), "loras=0.8: expected a file and"),
        (
            lambda: ExportOptions(quantize="int8", quantize_threshold=0),
            "quantize_threshold=0: expected a number",
        ),
        (lambda: ExportOptions(weights="move"), "weights='move': expected one of auto"),
        (lambda: BuildOptions(stages=("vae",)), "stages='vae': expected one of text_encoder"),
        (lambda: BuildOptions(profiles=("64x64",)), "profiles='64x64': expected the sizes of an image"),
    ],
)
def test_of_options(make: Callable[[], object], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        make()


def test_of_two_checkpoints(tiny: Path) -> None:
    with pytest.raises(UsageError, match="stages='vae': expected one of text_encoder"):
        compare_checkpoints(tiny / "model", tiny / "model", ["vae"])


def test_one_value_needs_no_list() -> None:
    assert stages_of("prior") == stages_of(Stage.PRIOR) == stages_of(["prior"]) == (Stage.PRIOR,)
    assert ExportOptions(stages="prior").stages == (Stage.PRIOR,)
    options = BuildOptions(targets="sm89", graphs="model", cache="plans")
    assert (options.targets, options.graphs, options.cache) == (("sm89",), ("model",), Path("plans"))


def test_a_single_report_needs_no_list(tiny: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert verify(tiny / "bundle", tiny / "model", stages="vqgan", reports=str(report), verdict=False)
    assert report.is_file()
