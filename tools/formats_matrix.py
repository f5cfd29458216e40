"""python tools/formats_matrix.py FILE: puts the cells that tests recorded in FILE into the records and docs/formats.md.

`make matrix` calls this. A cell replaces the earlier one of the same format and column."""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers.matrix import COLUMNS, RECORDS, UNOPENED  # noqa: E402

PAGE = ROOT / "docs" / "formats.md"
BEGIN, END = "<!-- from here on written by tools/formats_matrix.py -->\n", "<!-- to here -->\n"
LOSSLESS = 60  # dB; pictures that differ less are equal in 8 bits

Cell = dict[str, Any]


class Use(NamedTuple):
    """What a user wants, the row of the table for it, and the command that makes it."""

    wish: str
    format: str
    command: str


SITE = "--onnxruntime-web onnxruntime-web-1.30.0.tgz"
USES = (
    Use("ComfyUI, as a checkpoint", "comfyui", "convert model -o comfyui --to comfyui"),
    Use("ComfyUI, in 8 bits", "comfyui fp8", "convert model -o comfyui-fp8 --to comfyui --quantize fp8"),
    Use("ComfyUI, in 4 bits", "comfyui nvfp4", "convert model -o comfyui-nvfp4 --to comfyui --quantize nvfp4"),
    Use("ComfyUI, stage by stage", "split", "convert model -o split --to split"),
    Use("diffusers 0.42, as a pipeline", "modular", "convert model -o modular --to modular"),
    Use("diffusers, as networks", "diffusers", "convert model -o folder --to diffusers"),
    Use("diffusers, in 8 bits", "diffusers sdnq_int8", "convert model -o sdnq --to diffusers --quantize sdnq_int8"),
    Use("diffusers, in 4 bits", "diffusers sdnq_uint4", "convert model -o sdnq4 --to diffusers --quantize sdnq_uint4"),
    Use("diffusers, in GGUF", "gguf q8_0", "convert model -o gguf --to gguf --quantize q8_0"),
    Use("Stability's code", "original", "convert model -o original --to original"),
    Use("programs with ONNX Runtime", "bundle fp32", "export model -o bundle"),
    Use("programs with OpenVINO", "openvino ir", "ir bundle -o ir"),
    Use("a browser", "website", f"site bundle -o site {SITE}"),
    Use("a Triton server", "triton repository", "export-triton bundle -o repository"),
    Use("a LoRA in ComfyUI", "lora comfyui", "lora convert style.safetensors -o comfyui.safetensors --to comfyui"),
    Use("a LoRA in PEFT", "lora peft", "lora convert style.safetensors -o adapter --to peft"),
)


def merged(known: list[Cell], found: list[Cell]) -> list[Cell]:
    """The cells in the order of formats and columns."""
    cells = {(cell["format"], cell["column"]): cell for cell in (*known, *found)}
    order = list(COLUMNS)
    return [cells[key] for key in sorted(cells, key=lambda key: (key[0], order.index(key[1])))]


def table(cells: list[Cell]) -> str:
    """The table of the page: a row for each format, a column for each kind of cell."""
    rows: dict[str, dict[str, str]] = {name: {} for name in UNOPENED}
    for cell in cells:
        rows.setdefault(cell["format"], {})[cell["column"]] = shown(cell)
    headings = [f"{kind.heading} ({kind.unit})" if kind.unit else kind.heading for kind in COLUMNS.values()]
    aligned = ["---:" if kind.unit else "---" for kind in COLUMNS.values()]
    lines = [["format", *headings], ["---", *aligned]]
    lines += [[name, *(row.get(column, "") for column in COLUMNS)] for name, row in sorted(rows.items())]
    reasons = [f"- *{name}* has no cell: {reason}." for name, reason in UNOPENED.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n" + "".join(f"{line}\n" for line in reasons)


def uses(cells: list[Cell]) -> str:
    """The table of what to do for which program: what opened the file, and what it lost."""
    found = {(cell["format"], cell["column"]): cell for cell in cells}
    lines = [["for", "command", "opened by", "what it loses"], ["---"] * 4]
    for use in USES:
        cost = found.get((use.format, "cost"))
        opened = found[use.format, "opened"]["by"]
        lines.append([use.wish, f"`cascadekit {use.command}`", opened, lost(float(cost["value"])) if cost else ""])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def lost(cost: float) -> str:
    return "nothing" if cost >= LOSSLESS else f"details: {cost:.0f} dB"


def shown(cell: Cell) -> str:
    """The text of a cell: the program, or what was measured."""
    value = cell["value"]
    if value is None:
        return str(cell["by"])
    if cell["column"] == "memory":
        return f"{value:.0f}"
    if cell["column"] == "error":
        return "none" if value == 0 else f"{value:.2g}"
    return "equal" if value == "inf" else f"{value:.0f}"


def page_with(text: str, cells: list[Cell]) -> str:
    """The page `text` with the tables of `cells` in their places."""
    parts = text.split(BEGIN)
    tables = (uses(cells), table(cells))
    written = [f"{BEGIN}\n{made}\n{END}{part.partition(END)[2]}" for made, part in zip(tables, parts[1:], strict=True)]
    return "".join([parts[0], *written])


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
