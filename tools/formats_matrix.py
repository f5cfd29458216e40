"""python tools/formats_matrix.py FILE: puts the cells that tests recorded in FILE into the records and docs/formats.md.

`make matrix` calls this. A cell replaces the earlier one of the same format and column."""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers.matrix import COLUMNS, RECORDS  # noqa: E402

PAGE = ROOT / "docs" / "formats.md"
BEGIN, END = "<!-- from here on written by tools/formats_matrix.py -->\n", "<!-- to here -->\n"

Cell = dict[str, Any]


def merged(known: list[Cell], found: list[Cell]) -> list[Cell]:
    """The cells in the order of formats and columns."""
    cells = {(cell["format"], cell["column"]): cell for cell in (*known, *found)}
    order = list(COLUMNS)
    return [cells[key] for key in sorted(cells, key=lambda key: (key[0], order.index(key[1])))]


def table(cells: list[Cell]) -> str:
    """The table of the page: a row for each format, a column for each kind of cell."""
    rows: dict[str, dict[str, str]] = {}
    for cell in cells:
        rows.setdefault(cell["format"], {})[cell["column"]] = shown(cell)
    headings = [f"{kind.heading} ({kind.unit})" if kind.unit else kind.heading for kind in COLUMNS.values()]
    aligned = ["---:" if kind.unit else "---" for kind in COLUMNS.values()]
    lines = [["format", *headings], ["---", *aligned]]
    lines += [[name, *(row.get(column, "") for column in COLUMNS)] for name, row in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def shown(cell: Cell) -> str:
    """The text of a cell: the program, or what was measured."""
    value = cell["value"]
    if value is None:
        return str(cell["by"])
    if cell["column"] == "error":
        return "none" if value == 0 else f"{value:.2g}"
    return "equal" if value == "inf" else f"{value:.0f}"


def page_with(text: str, cells: list[Cell]) -> str:
    """The page `text` with the table of `cells` in its place."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table(cells)}\n{END}{rest.partition(END)[2]}"


def main(file: Path) -> None:
    known = json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.is_file() else []
    found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    cells = merged(known, found)
    lines = ",\n".join(json.dumps(cell) for cell in cells)
    RECORDS.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), cells), encoding="utf-8")
    print(f"{len(found)} cells recorded, {len(cells)} in all: {RECORDS.relative_to(ROOT)}, {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
