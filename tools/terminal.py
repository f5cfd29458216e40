"""Runs something on a terminal of some columns, and makes a picture of what stays on its screen."""

import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

TOKEN = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n])")
LONGEST = 46  # rows of a picture; the middle of a longer screen is left out
# rich's picture loads its font from a server; ours takes what the reader's machine has.
SVG = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.S).replace(
    "Fira Code, monospace", "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"
)
SVG = SVG.replace("font-size: {char_height}px", "font-size: 21px")  # so that the lines of frames meet

Cell = tuple[str, str]  # a character, and the codes of its colours


@dataclass
class Screen:
    """What a terminal shows. It obeys what our commands send: returns, steps up, erased lines, colours."""

    columns: int = 80
    rows: list[list[Cell]] = field(default_factory=lambda: [[]])
    broken: set[int] = field(default_factory=set)  # rows that were too long, so that the terminal broke them
    row: int = 0
    column: int = 0
    codes: str = ""

    def write(self, text: str) -> None:
        """Show `text`."""
        for number, action, end, character in TOKEN.findall(text):
            if character:
                self._put(character)
            elif end == "\r":
                self.column = 0
            elif end == "\n":
                self._next_row()
            elif action == "m":
                self.codes = "" if number in ("", "0") else f"{self.codes};{number}".lstrip(";")
            elif action == "A":
                self.row = max(0, self.row - int(number or 1))
            elif action == "K":
                del self.rows[self.row][0 if number == "2" else self.column :]

    def _put(self, character: str) -> None:
        if self.column == self.columns:
            self.broken.add(self.row)
            self._next_row()
            self.column = 0
        cells = self.rows[self.row]
        cells += [(" ", "")] * (self.column + 1 - len(cells))
        cells[self.column] = (character, self.codes)
        self.column += 1

    def _next_row(self) -> None:
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append([])

    def lines(self) -> list[str]:
        """The rows without colours, and without blanks at their ends."""
        return ["".join(character for character, _ in cells).rstrip() for cells in self.rows]

    def coloured(self) -> list[str]:
        """The rows with the codes of their colours."""
        return ["".join(f"\x1b[0;{codes}m{character}" for character, codes in cells) for cells in self.rows]


@contextmanager
def terminal(columns: int) -> Iterator[Screen]:
    """Make standard input, output and error a terminal of `columns` for the time of the block, this process's children
    included. The screen is complete when the block has ended."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    screen, written = Screen(columns), bytearray()
    reader = threading.Thread(target=_read_all, args=(ours, written.extend))
    reader.start()
    descriptors, streams = [os.dup(number) for number in range(3)], (sys.stdout, sys.stderr)
    _flush()
    for number in range(3):
        os.dup2(theirs, number)
    os.close(theirs)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    try:
        yield screen
    finally:
        _flush()
        sys.stdout, sys.stderr = streams
        for number, kept in enumerate(descriptors):
            os.dup2(kept, number)
            os.close(kept)
        reader.join()
        os.close(ours)
        screen.write(written.decode())


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _read_all(source: int, take: Callable[[bytes], None]) -> None:
    while True:
        try:
            part = os.read(source, 1 << 16)
        except OSError:  # Linux: nobody holds the other end any more
            return
        take(part)


def picture(screens: Sequence[tuple[str, Screen]], title: str) -> str:
    """An SVG of the commands and their screens. It refers to no other file and no server."""
    rows: list[Text] = []
    for command, screen in screens:
        rows.append(Text(f"$ {command}", style="bold green", no_wrap=False))
        rows += map(Text.from_ansi, screen.coloured())
        while not rows[-1].plain.strip():
            rows.pop()
    if len(rows) > LONGEST:
        rows[LONGEST // 2 : -LONGEST // 2] = [Text("...", style="dim")]
    rows.append(Text())  # rich cuts off what reaches below the last row
    console = Console(record=True, width=screens[0][1].columns, file=io.StringIO(), force_terminal=True)
    for row in rows:
        console.print(row, highlight=False)
    return console.export_svg(title=title, code_format=SVG, unique_id=re.sub(r"\W+", "-", title.lower()))
