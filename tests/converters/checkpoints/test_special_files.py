"""Pipes and devices where a model or a bundle has files: no command waits for them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CODE = "import sys; from cascadekit.cli import main; main(sys.argv[1:])"


@pytest.mark.parametrize("link", [None, "/dev/zero"])
@pytest.mark.parametrize("place", ["prior/diffusion_pytorch_model.safetensors", "stray.safetensors"])
def test_a_model_folder(tiny: Path, tmp_path: Path, place: str, link: str | None) -> None:
    """Opening a pipe would wait for ever; a device has no end."""
    shutil.copytree(tiny / "model" / "prior", tmp_path / "model" / "prior")
    path = tmp_path / "model" / place
    path.unlink(missing_ok=True)
    path.symlink_to(link) if link else os.mkfifo(path)
    ended = subprocess.run(
        [sys.executable, "-c", CODE, "export", str(tmp_path / "model"), "-o", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert "Traceback" not in ended.stderr
    assert ended.returncode in (0, 1, 2)


@pytest.mark.parametrize("name", ["cascade.json", "vqgan/weights.safetensors", "tokenizer/tokenizer.json"])
def test_a_bundle(tiny: Path, tmp_path: Path, name: str) -> None:
    root = Path(shutil.copytree(tiny / "bundle", tmp_path / "bundle"))
    (root / name).unlink()
    os.mkfifo(root / name)
    for command in (
        ["inspect", str(root)],
        ["generate", str(root), "x", "-o", str(tmp_path / "x.png"), "--size", "64x64"],
    ):
        ended = subprocess.run(
            [sys.executable, "-c", CODE, *command], capture_output=True, text=True, check=False, timeout=120
        )
        assert "Traceback" not in ended.stderr
        assert command[0] == "inspect" or ended.returncode in (1, 2)
