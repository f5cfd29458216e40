"""Prompts in Parquet, written by pyarrow."""

from datetime import date
from pathlib import Path

import pytest

from cascadekit.runtime.batch.prompt_files import read_prompt_file
from cascadekit.schemas.errors import UsageError

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")


def write(path: Path, columns: dict[str, list[object]]) -> Path:
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_rows_are_requests(tmp_path: Path) -> None:
    columns = {"prompt": ["ein Bär", "猫", "c"], "seed": [1, None, -3], "prior_timesteps": [[1.0, 0.0], None, None]}
    found = read_prompt_file(write(tmp_path / "p.PARQUET", columns)).entries
    assert [(entry.line, entry.given) for entry in found] == [
        (1, {"prompt": "ein Bär", "seed": 1, "prior_timesteps": [1.0, 0.0]}),
        (2, {"prompt": "猫"}),
        (3, {"prompt": "c", "seed": -3}),
    ]


def test_columns_that_are_no_fields(tmp_path: Path) -> None:
    file = read_prompt_file(write(tmp_path / "p.parquet", {"prompt": ["a", "b"], "day": [date(2026, 1, 1), None]}))
    assert "expected text, numbers and lists" in (file.entries[0].problem or "")
    assert file.entries[1].problem is None


@pytest.mark.parametrize("content", [b"", b"PAR1", b"prompt\na\n"])
def test_what_is_no_table(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.parquet").write_bytes(content)
    with pytest.raises(UsageError, match=r"p.parquet: cannot be read as Parquet"):
        read_prompt_file(tmp_path / "p.parquet")


def test_no_rows(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no prompts"):
        read_prompt_file(write(tmp_path / "p.parquet", {"prompt": []}))
