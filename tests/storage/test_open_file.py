"""Opening files to read: every fault is one CheckpointError that names the file."""

import os
from pathlib import Path

import pytest

from cascadekit.schemas.errors import CheckpointError
from cascadekit.storage.open_file import opened


def test_a_file_and_a_link_to_it(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("x")
    for name in ("x", "link"):
        with opened(tmp_path / name) as file:
            assert file.read() == b"abc"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("absent", "cannot be read: No such file"),
        ("folder", "not a regular file"),
        ("pipe", "not a regular file"),
        ("device", "not a regular file"),
        ("loop", "cannot be read: "),
    ],
)
def test_anything_else(tmp_path: Path, kind: str, message: str) -> None:
    path = tmp_path / "x"
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to("x")
    with pytest.raises(CheckpointError, match=f"x: .*{message}"), opened(path):
        pass


def test_an_error_while_reading(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="x: cannot be read: Input/output error"), opened(tmp_path / "x"):
        raise OSError(5, "Input/output error")
