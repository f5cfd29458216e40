"""The cells of docs/formats.md: what tests record of formats and of the foreign programs that opened or wrote them.

A test that takes the fixture `matrix` records cells. Each cell is compared with the committed one, so a run of the
tests holds the page to be true. `make matrix` runs these tests and commits what they record to RECORDS and the page."""

import json
import math
import os
from collections.abc import Callable, Mapping
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "tests" / "data" / "formats_matrix.json"
WRITING = "CASCADEKIT_MATRIX"  # the variable with the file to write cells to


class Kind(NamedTuple):
    """A column: its heading, and whether a found value is as good as a committed one."""

    heading: str
    unit: str
    holds: Callable[[float, float], bool]


COLUMNS: Mapping[str, Kind] = {
    "opened": Kind("written; opened by", "", lambda found, known: True),
    "picture": Kind("its picture against ours", "dB", lambda found, known: found >= min(known - 6, 90)),
    "cost": Kind("against the model before", "dB", lambda found, known: abs(found - known) <= 1.5),
    "judged": Kind("judged right", "of 2", lambda found, known: found == known),
    "memory": Kind("peak memory", "MB", lambda found, known: found <= 1.25 * known + 10),
    "read": Kind("read; written by", "", lambda found, known: True),
    "error": Kind("error of what is read", "relative L2", lambda found, known: found <= 1.25 * known + 1e-6),
}

# Rows without cells: what is written, and why no foreign program opened it in a test.
UNOPENED: Mapping[str, str] = {
    "bundle bf16": "ONNX Runtime computes bf16 on GPUs alone",
    "lora diffusers": "its reader is OneTrainer, which no test runs",
    "package of aotinductor": "torch opens it through cascadekit's own engine alone",
    "plan of tensorrt": "TensorRT writes and opens it on the machine's GPU",
    "plan of tensorrt-rtx": "TensorRT-RTX opens it on a GPU alone",
}


class Matrix:
    """Records cells of one test."""

    def __init__(self, test: str) -> None:
        self._test = test
        known = json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.is_file() else []
        self._known = {(cell["format"], cell["column"]): cell for cell in known}

    def record(self, format: str, column: str, value: float | None = None, *, by: str = "", version: str = "") -> None:
        """Record that the program `by` did what `column` says with files of the `format`; `value` is what was measured.

        `by` is the name of an installed package, with words after a space if needed; of any other program give the
        `version`."""
        name, _, words = by.partition(" ")
        program = f"{name} {version or installed(name)}{f' {words}' if words else ''}" if name else ""
        found = {"format": format, "column": column, "value": _plain(value), "by": program, "test": self._test}
        if os.environ.get(WRITING):
            with open(os.environ[WRITING], "a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            return
        known = self._known.get((format, column))
        advice = "run `make matrix` and commit what it writes"
        assert known is not None, f"docs/formats.md has no cell {column!r} of {format}: {advice}"
        assert known["by"].split(" ")[0] == name, f"{format}, {column}: the page names {known['by']}: {advice}"
        if value is not None:
            assert COLUMNS[column].holds(value, float(known["value"])), (
                f"{format}, {column}: found {value:g}, the page says {known['value']}: {advice}"
            )


def _plain(value: float | None) -> Any:
    return value if value is None or math.isfinite(value) else str(value)
