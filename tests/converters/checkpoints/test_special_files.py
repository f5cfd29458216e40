"""Pipes and devices where a model or a bundle has files: no command waits for them."""

import os
import shutil
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

CODE = """
import sys
sys.stdout = open({said!r}, "w")
sys.stderr = open({said!r}, "a")
from cascadekit.cli import main
main({arguments!r})
"""
SECONDS = 60  # much more than a command takes, and much less than for ever


def ended(server: ForkServerContext, folder: Path, *arguments: str) -> int | None:
    """The exit code of a command in a process of its own. The test fails if the command waits, or shows a traceback."""
    said = folder / "said"
    code = CODE.format(said=str(said), arguments=list(arguments))
    process = server.Process(target=exec, args=(code, {"__name__": "child"}))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        pytest.fail(f"{arguments} waits")
    assert "Traceback" not in said.read_text()
    return process.exitcode


@pytest.mark.parametrize("link", [None, "/dev/zero"])
@pytest.mark.parametrize("place", ["prior/diffusion_pytorch_model.safetensors", "stray.safetensors"])
def test_a_model_folder(server: ForkServerContext, tiny: Path, tmp_path: Path, place: str, link: str | None) -> None:
    """Opening a pipe would wait for ever; a device has no end."""
    shutil.copytree(tiny / "model" / "prior", tmp_path / "model" / "prior")
    path = tmp_path / "model" / place
    path.unlink(missing_ok=True)
    path.symlink_to(link) if link else os.mkfifo(path)
    assert ended(server, tmp_path, "export", str(tmp_path / "model"), "-o", str(tmp_path / "out")) in (0, 1, 2)


@pytest.mark.parametrize("name", ["cascade.json", "vqgan/weights.safetensors", "tokenizer/tokenizer.json"])
def test_a_bundle(server: ForkServerContext, tiny: Path, tmp_path: Path, name: str) -> None:
    root = Path(shutil.copytree(tiny / "bundle", tmp_path / "bundle"))
    (root / name).unlink()
    os.mkfifo(root / name)
    for command in (
        ["inspect", str(root)],
        ["generate", str(root), "x", "-o", str(tmp_path / "x.png"), "--size", "64x64"],
    ):
        code = ended(server, tmp_path, *command)
        assert command[0] == "inspect" or code in (1, 2)
