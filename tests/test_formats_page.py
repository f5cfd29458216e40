"""docs/formats.md is what the records say, and each record is of a test that is still there."""

import ast
import importlib.util
import json
from pathlib import Path

import pytest

from cascadekit.cli.lora.convert import WRITTEN as WRITTEN_LORAS
from cascadekit.schemas.block_types import WRITTEN
from cascadekit.schemas.comfy_formats import CHOICES
from cascadekit.schemas.layouts import Layout
from cascadekit.schemas.precision import Precision
from cascadekit.schemas.quantization import Quantization
from cascadekit.schemas.sdnq_formats import SDNQ_CHOICES
from helpers.matrix import COLUMNS, RECORDS, UNOPENED, Matrix

ROOT = Path(__file__).parents[1]
CELLS = json.loads(RECORDS.read_text(encoding="utf-8"))


def functions_in(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_the_page_shows_the_records() -> None:
    spec = importlib.util.spec_from_file_location("formats_matrix", ROOT / "tools" / "formats_matrix.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    assert tool.page_with(page, CELLS) == page
    assert len(CELLS) > 40


def test_each_cell_has_a_test_that_takes_the_fixture() -> None:
    for cell in CELLS:
        path, _, name = cell["test"].partition("::")
        assert name in functions_in(ROOT / path), cell
        assert "matrix: Matrix" in (ROOT / path).read_text(), cell


def test_no_cell_without_a_foreign_program() -> None:
    """Memory is that of our own process; its format has other cells."""
    foreign = [cell for cell in CELLS if cell["column"] != "memory"]
    for cell in foreign:
        assert cell["by"].split(" ")[0] not in ("", "cascadekit"), cell
        assert cell["column"] in COLUMNS
    assert {cell["format"] for cell in CELLS} == {cell["format"] for cell in foreign}


def test_every_format_that_is_written_has_a_row() -> None:
    """A cell may be empty; a choice of the command line without a row would be forgotten."""
    known = {cell["format"] for cell in CELLS}
    shown = {
        *(str(layout) for layout in Layout),
        *(f"gguf {kind.lower()}" for kind in WRITTEN),
        *(f"comfyui {kind.lower()}" for kind in CHOICES),
        *(f"diffusers {kind.lower()}" for kind in SDNQ_CHOICES),
        *(f"bundle {kind}" for kind in (*Precision, *Quantization) if kind is not Quantization.NONE),
        *(f"lora {form}" for form in WRITTEN_LORAS),
    }
    assert shown <= known | UNOPENED.keys()
    assert not known & UNOPENED.keys()


def test_what_differs_from_the_page_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CASCADEKIT_MATRIX", raising=False)
    cell = next(cell for cell in CELLS if cell["column"] == "picture")
    program = cell["by"].split(" ")[0]
    matrix = Matrix(cell["test"])
    matrix.record(cell["format"], "picture", float(cell["value"]), by=program)
    for format, value, by in (
        (cell["format"], 20.0, program),
        (cell["format"], 200.0, "numpy"),
        ("another", 200.0, program),
    ):
        with pytest.raises(AssertionError, match="make matrix"):
            matrix.record(format, "picture", value, by=by)
