"""An image says what it was made with, and --like says what is another one here."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image, PngImagePlugin

from cascadekit.cli import main
from cascadekit.runtime.images.png import read_settings
from cascadekit.runtime.images.png_text import METADATA_KEY

SMALL = ["--size", "64x64", "--prior-steps", "1", "--decoder-steps", "1", "--seed", "0", "--threads", "1"]
AGAIN = ["--threads", "1", "--engine", "onnxruntime", "--force"]


def called(*arguments: object) -> str:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


@pytest.fixture(scope="module")
def image(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "x.png"
    called("generate", tiny / "bundle", "x", "-o", path, "--engine", "onnxruntime", *SMALL)
    return path


def test_what_an_image_says(image: Path) -> None:
    settings = read_settings(image) or {}
    assert settings["engine"] == "onnxruntime"
    assert settings["precision"] == dict.fromkeys(("text_encoder", "prior", "decoder", "vqgan"), "fp32")
    assert len(settings["bundle"]) == 64
    assert settings["version"]


def test_the_same_again_says_nothing(image: Path, tiny: Path, tmp_path: Path) -> None:
    said = called("generate", tiny / "bundle", "--like", image, "-o", tmp_path / "y.png", *AGAIN)
    assert "differ" not in said
    with Image.open(image) as first, Image.open(tmp_path / "y.png") as second:
        assert first.tobytes() == second.tobytes()


def test_another_engine(image: Path, tiny: Path, tmp_path: Path) -> None:
    said = called(
        "generate", tiny / "bundle", "--like", image, "-o", tmp_path / "y.png", "--engine", "openvino", "--threads", "1"
    )
    assert f"{image} was made with engine onnxruntime (here openvino): pixels may differ" in said


def changed(image: Path, to: Path, **settings: object) -> Path:
    """The image with other settings; None takes one away."""
    with Image.open(image) as picture:
        found = {**json.loads(picture.info[METADATA_KEY]), **settings}
        info = PngImagePlugin.PngInfo()
        info.add_itxt(METADATA_KEY, json.dumps({name: value for name, value in found.items() if value is not None}))
        picture.save(to, pnginfo=info)
    return to


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bundle": "0" * 64}, "another bundle (000000000000..., here"),
        ({"precision": {"prior": "bf16"}}, "precision prior bf16 (here text_encoder fp32, prior fp32"),
        ({"version": "0.0.1"}, "version 0.0.1 (here"),
    ],
)
def test_another_bundle_precision_or_version(
    image: Path, tiny: Path, tmp_path: Path, settings: dict[str, object], words: str
) -> None:
    like = changed(image, tmp_path / "like.png", **settings)
    said = called("generate", tiny / "bundle", "--like", like, "-o", tmp_path / "y.png", *AGAIN)
    assert words in said
    assert "pixels may differ" in said


def test_images_of_older_versions(image: Path, tiny: Path, tmp_path: Path) -> None:
    like = changed(image, tmp_path / "like.png", precision=None, bundle=None, version=None)
    assert "differ" not in called("generate", tiny / "bundle", "--like", like, "-o", tmp_path / "y.png", *AGAIN)
