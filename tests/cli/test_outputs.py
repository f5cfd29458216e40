"""Commands that write into folders which hold other things, as users call them."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cascadekit.cli import main

FOREIGN = {"sdxl.safetensors": "another checkpoint", "docs/thesis.txt": "precious"}


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def done(*arguments: object) -> Result:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(text: str, *arguments: object) -> None:
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert text in result.stderr.replace("\n", " "), result.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with other things."""
    for name, text in FOREIGN.items():
        path = tmp_path / "home" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "home"


def assert_foreign(folder: Path) -> None:
    assert {name: (folder / name).read_text() for name in FOREIGN} == FOREIGN


@pytest.mark.parametrize("to", ["comfyui", "diffusers", "original"])
def test_convert_leaves_what_is_there(tiny: Path, folder: Path, to: str) -> None:
    command = ("convert", tiny / "model", "-o", folder, "--to", to)
    assert "replaced" not in done(*command).stderr
    refused("--force to replace", *command)
    assert "replaced" in done(*command, "--force").stderr
    assert_foreign(folder)


def test_a_bundle_goes_beside_what_is_there_and_is_replaced_alone(tiny: Path, folder: Path, tmp_path: Path) -> None:
    command = ("export", tiny / "model", "--stage", "vqgan", "-o", folder)
    done(*command)
    refused("a bundle with other files in it: docs/thesis.txt, sdxl.safetensors", *command, "--force")
    assert_foreign(folder)
    whole = ("export", tiny / "model", "--stage", "vqgan", "-o", tmp_path / "bundle")
    done(*whole)
    (tmp_path / "bundle" / "vqgan" / "notes.txt").write_text("precious")
    refused("a bundle with other files in it: vqgan/notes.txt", *whole, "--force")
    (tmp_path / "bundle" / "vqgan" / "notes.txt").unlink()
    (tmp_path / "bundle" / "vqgan" / "plans").mkdir()
    (tmp_path / "bundle" / "vqgan" / "plans" / "model.plan").touch()  # left by a killed build
    assert "replaced" in done(*whole, "--force").stderr
    refused("is a bundle", "convert", tiny / "model", "--to", "diffusers", "-o", tmp_path / "bundle", "--force")


def test_shards_of_an_older_conversion_never_lie_beside_new_weights(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("convert", tiny / "model", "-o", out, "--to", "diffusers")
    done(*command, "--shard-size", "1MB")
    shards = sorted(path.name for path in (out / "prior").glob("*-of-*.safetensors"))
    assert shards
    (out / "notes.txt").write_text("precious")
    refused("of another model, which would be read together", *command, "--force")
    assert sorted(path.name for path in (out / "prior").glob("*-of-*.safetensors")) == shards
    (out / "notes.txt").unlink()
    done(*command, "--force")  # a model folder and nothing else: it is replaced whole
    assert sorted(path.name for path in (out / "prior").iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip


def test_another_variant_goes_beside_the_first(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("convert", tiny / "model", "-o", out, "--to", "diffusers")
    done(*command)
    done(*command, "--dtype", "bf16", "--as-variant", "bf16", "--force")
    assert {path.name for path in (out / "prior").iterdir()} == {
        "config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bf16.safetensors",
    }  # fmt: skip


def test_reports_and_recordings_replace_nothing_unasked(tiny: Path, tmp_path: Path) -> None:
    command = ("verify", tiny / "bundle", "--against", tiny / "model", "--stage", "vqgan", "--no-verdict")
    report = tmp_path / "report.json"
    report.write_text("mine")
    refused("report.json: exists already", *command, "--report", report)
    refused("exists already", *command, "--record", report)
    refused("is inside the source", *command, "--report", tiny / "bundle" / "r.json")
    refused("is inside the source", *command, "--record", tiny / "model" / "r.safetensors", "--force")
    assert report.read_text() == "mine"


def test_images_lie_outside_of_the_bundle_and_replace_no_picture(tiny: Path, tmp_path: Path) -> None:
    quick = ("--size", "64x64", "--prior-steps", 1, "--decoder-steps", 1)
    photo = tmp_path / "photo.png"
    (tmp_path / "photo.preview.png").write_text("mine")
    done("generate", tiny / "bundle", "x", *quick, "-o", photo)
    assert (tmp_path / "photo.preview.png").read_text() == "mine"
    before = photo.read_bytes()
    refused("is the source", "generate", tiny / "bundle", "--like", photo, "-o", photo, "--force")
    refused("is inside the source", "generate", tiny / "bundle", "x", "-o", tiny / "bundle" / "images")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    batch = ("generate", tiny / "bundle", "--prompts", prompts, *quick, "-o", tmp_path / "images", "--force")
    refused("is the source", *batch, "--log", prompts)
    assert (photo.read_bytes(), prompts.read_text()) == (before, "a cat\n")
