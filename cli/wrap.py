"""Breaks lines, and the cells of tables, between words: a terminal would break them within a word.

Only a word that is longer than the whole line is broken: a path after a "/", anything else where the line ends.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

HANGING = 2  # columns by which the further lines of a text are indented
FRAME = 3  # columns that a frame takes for each column of a table, and 1 more for the table
TALL = 2  # lines of a cell; a table with taller cells leaves out columns that it can do without
PARTS = re.compile(r"[^/\s]*/|[^/\s]+")  # of paths, and words
COMMAND = re.compile(r"\s*cascadekit [a-z]")


def wrapped(text: str, width: int) -> Iterator[str]:
    r"""The lines of `text`, at most `width` columns each. Lines of a command end with a backslash, for pasting."""
    for line in text.split("\n"):
        indent = len(line) - len(line.lstrip(" "))
        hanging = " " * min(indent + HANGING, width // 2)
        is_command = COMMAND.match(line) is not None and cell_width(line) > width
        lines = list(_lines(line, width - 2 if is_command else width, hanging))
        yield from (f"{each} \\" for each in lines[:-1]) if is_command else lines[:-1]
        yield lines[-1]


def _lines(line: str, width: int, hanging: str = "") -> Iterator[str]:
    """One line in parts of at most `width` columns; those after the first begin with `hanging`."""
    current = ""
    for blanks, word in re.findall(r"(\s*)(\S+)", line):
        if current.strip() and cell_width(current + blanks + word) > width:
            yield current
            current, blanks = hanging, ""
        room = width - max(map(cell_width, (hanging, current + blanks)))
        for piece in _pieces(word, max(room, 1)):
            if current.strip() and cell_width(current + blanks + piece) > width:
                yield current
                current, blanks = hanging, ""
            current, blanks = current + blanks + piece, ""
    yield current


def _pieces(word: str, room: int) -> Iterator[str]:
    """The word whole if it fits into `room` columns, else the parts of a path; longer parts are cut."""
    for part in [word] if cell_width(word) <= room else PARTS.findall(word):
        piece = ""
        for character in part:
            if cell_width(piece + character) > room and piece:
                yield piece
                piece = ""
            piece += character
        yield piece


@dataclass(frozen=True)
class TableLayout:
    """The columns of a table that are shown, by number, and their widths. Without columns it fits no frame."""

    shown: tuple[int, ...]
    widths: tuple[int, ...]


def layout(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int, optional: Sequence[str]) -> TableLayout:
    """The layout of a table in `width` columns. Columns are left out in the order of `optional`, until no cell takes
    more than TALL lines."""
    shown = list(range(len(columns)))
    left_out = [columns.index(name) for name in optional]
    while True:
        cells = [[row[n] for row in (columns, *rows)] for n in shown]
        widths = _widths(cells, width - FRAME * len(shown) - 1)
        if widths and (not left_out or _tallest(cells, widths) <= TALL):
            return TableLayout(tuple(shown), tuple(widths))
        if not left_out:
            return TableLayout((), ())
        shown.remove(left_out.pop(0))


def _widths(cells: Sequence[Sequence[str]], room: int) -> list[int]:
    """The width of each column, `room` at most in all; none when a word, or a part of a path, would be broken."""
    least = [max(max(map(cell_width, PARTS.findall(cell)), default=0) for cell in column) for column in cells]
    wanted = [max(map(cell_width, column)) for column in cells]
    if sum(wanted) <= room:
        return wanted
    if sum(least) > room:
        return []
    widths, spare = list(least), room - sum(least)
    while spare > 0:  # a column at a time, to the one that is folded most
        n = max(range(len(widths)), key=lambda n: wanted[n] / widths[n] if widths[n] else 0.0)
        if wanted[n] <= widths[n]:
            break
        widths[n] += 1
        spare -= 1
    return widths


def _tallest(cells: Sequence[Sequence[str]], widths: Sequence[int]) -> int:
    return max(
        len(folded(cell, width).split("\n")) for column, width in zip(cells, widths, strict=True) for cell in column
    )


def folded(cell: str, width: int) -> str:
    """A cell in lines of at most `width` columns."""
    return "\n".join(_lines(cell, max(width, 1)))


def stacked(columns: Sequence[str], row: Sequence[str]) -> Iterator[str]:
    """A row of a table that is too wide: its first cell, then a line for each other cell."""
    yield row[0]
    for name, cell in zip(columns[1:], row[1:], strict=True):
        if cell:
            yield f"  {name}: {cell}" if name else f"  {cell}"


def cell_width(text: str) -> int:
    """The columns of a terminal that `text` takes; East Asian characters take two, joined ones none."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)
