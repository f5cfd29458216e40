"""Whatever program saved a checkpoint: it is read with every value, or refused by its name."""

import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from cascadekit import convert
from cascadekit.cli import main
from cascadekit.schemas.errors import CascadeError
from foreign.checkpoints import ROWS, Saved
from helpers.matrix import Matrix

# Rows that a library's own writer saved: the format in docs/formats.md, and the library.
SAVED_BY = {
    "diffusers: one component's folder": ("diffusers", "diffusers"),
    "transformers: a text encoder": ("diffusers text encoder", "transformers"),
}


@pytest.mark.parametrize("name", ROWS)
def test_checkpoints_of_other_programs(tmp_path: Path, name: str, matrix: Matrix) -> None:
    saved = ROWS[name](tmp_path / "source")
    output = tmp_path / "out"
    if not saved.truth:
        with pytest.raises(CascadeError) as refusal:
            converted(saved, output)
        assert_said(saved, str(refusal.value))
        assert "damaged" not in str(refusal.value)
        assert not output.exists()
        return
    assert_said(saved, "\n".join(converted(saved, output)))
    for stage, tensors in saved.truth.items():
        (path,) = (output / stage).glob("*.safetensors")
        found = load_file(path)
        assert found.keys() == tensors.keys(), stage
        differing = [key for key, tensor in tensors.items() if not torch.equal(found[key], tensor)]
        assert not differing, stage
        assert all(found[key].dtype == tensor.dtype for key, tensor in tensors.items())
    if name in SAVED_BY:
        format, program = SAVED_BY[name]
        matrix.record(format, "read", by=program)
        matrix.record(format, "error", 0, by=program)
    written = {path.parent.relative_to(output).as_posix() for path in output.rglob("*.safetensors")}
    assert written == {str(stage) for stage in saved.truth}
    shown = CliRunner().invoke(main, ["inspect", *map(str, saved.sources)])
    assert shown.exit_code == int(saved.unreadable), shown.output


def converted(saved: Saved, output: Path) -> tuple[str, ...]:
    encoders = {"text_encoder": saved.text_encoder, "image_encoder": saved.image_encoder}
    return convert(saved.sources, output, "diffusers", **encoders, **saved.options).notes


def assert_said(saved: Saved, text: str) -> None:
    for pattern in saved.said:
        assert re.search(pattern, text, re.DOTALL), (pattern, text)
