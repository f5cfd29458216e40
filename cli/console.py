"""Output of the command line: frames on a terminal, plain lines in a pipe, control characters escaped.

| function   | writes                                    | to     | --quiet | --json     |
|------------|-------------------------------------------|--------|---------|------------|
| `finish`   | the result of a command                   | stdout | nothing | JSON alone |
| `say`      | further lines of the result               | stdout | nothing | yes        |
| `note`     | what the user should know, but no error   | stderr | nothing | yes        |
| `inform`   | what happens now                          | stderr | nothing | yes        |
| `detail`   | what people seldom need (with --verbose)  | stderr | nothing | yes        |
| `complain` | errors                                    | stderr | yes     | yes        |
"""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import IntEnum
from functools import cache
from typing import TYPE_CHECKING, Any, Self, TextIO

import click

from ..schemas.errors import CascadeError
from .escape import visible, visible_line
from .translate import in_options

if TYPE_CHECKING:
    from rich.console import Console

FAILED, WRONG_USAGE = 1, 2
_VOLUME = "cascadekit.volume"  # the key of `click.Context.meta` for how much a command writes
WIDTH = 100  # columns of a line of prose on a terminal; a narrower one has its own


class Volume(IntEnum):
    """How much a command writes: errors alone (--quiet), what people need, or all details (--verbose)."""

    QUIET = 0
    USUAL = 1
    VERBOSE = 2


def volume() -> Volume:
    """The volume of the running command."""
    ctx = click.get_current_context(silent=True)
    return ctx.meta.get(_VOLUME, Volume.USUAL) if ctx else Volume.USUAL


def set_volume(ctx: click.Context, chosen: Volume) -> None:
    """Set the volume of the running command. Raises UsageError when another was chosen before."""
    if ctx.meta.setdefault(_VOLUME, chosen) is not chosen:
        raise click.UsageError("--quiet and --verbose: give one of them.")


class OutputError(CascadeError):
    """Standard output cannot be written."""

    unread = False  # the reader of the pipe is gone, so no message can reach it

    @classmethod
    def of(cls, error: OSError) -> Self:
        made = cls(f"standard output: cannot be written: {error.strerror}")
        made.unread = isinstance(error, BrokenPipeError)
        return made


class Stream:
    """Standard output or standard error. rich, which takes a while to import, is used on a terminal alone."""

    def __init__(self, *, stderr: bool = False) -> None:
        self._stderr = stderr
        self.has_bars = False  # set while bars are shown

    @property
    def is_terminal(self) -> bool:
        """True when bars and frames are shown. The variables FORCE_COLOR and TTY_COMPATIBLE of rich decide, if set."""
        forced = [os.environ.get(name, "") for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")]
        return self.console.is_terminal if any(forced) else _is_tty(self._file)

    @property
    def console(self) -> "Console":
        """The stream as rich's console."""
        return _console(self._stderr)

    @property
    def _file(self) -> TextIO | None:
        return sys.stderr if self._stderr else sys.stdout

    def write_line(self, text: str, style: str | None = None, *, whole: bool = False) -> None:
        """Write `text` and a line end; `style` colours it on a terminal. Raises OSError when it cannot be written.

        A terminal gets lines that are broken between words, unless the text shall stay `whole`. While bars are shown on
        the terminal, the line goes through their console, which makes room for it."""
        if self.is_terminal:
            from .wrap import wrapped

            console = err.console if err.has_bars else self.console
            for line in [text] if whole else wrapped(text, console.width):
                console.print(line, style=style, markup=False)
        elif self._file is not None:
            self._file.write(f"{text}\n")
            self._file.flush()


def _is_tty(file: TextIO | None) -> bool:
    try:
        return file is not None and file.isatty()
    except ValueError:  # closed
        return False


@cache
def _console(stderr: bool) -> "Console":
    from rich.console import Console

    class Terminal(Console):
        """A console that leaves it to its caller what a closed pipe means."""

        def on_broken_pipe(self) -> None:
            raise

    return Terminal(stderr=stderr, highlight=False, emoji=False, soft_wrap=True)


out = Stream()
err = Stream(stderr=True)


def say(text: str) -> None:
    """Write a line for the user to standard output. Raises OutputError when that cannot be written."""
    if volume() is not Volume.QUIET:
        _write(text)


def say_wrapped(text: str) -> None:
    """Write a line of the result; a terminal gets it in lines of at most WIDTH columns, a pipe whole."""
    from .wrap import wrapped

    text = visible_line(text)
    for line in wrapped(text, min(WIDTH, out.console.width)) if out.is_terminal else [text]:
        say(line)


def finish(text: str, facts: Any, *, as_json: bool) -> None:
    """Write the result of a command as a line, or `facts` as JSON. Raises OutputError when that cannot be written."""
    if as_json:
        say_json(facts)
    else:
        say(text)


def say_json(facts: Any) -> None:
    """Write JSON to standard output, also with --quiet. Raises OutputError when that cannot be written."""
    import json

    _write(json.dumps(facts, indent=2), whole=True)


def _write(text: str, *, whole: bool = False) -> None:
    with _output_errors():
        out.write_line(visible(text), whole=whole)


def note(text: str) -> None:
    """Write something that the user should know, but that is no error, to standard error."""
    if volume() is not Volume.QUIET:
        complain(f"note: {in_options(text)}", style="yellow")


def inform(text: str) -> None:
    """Write what is happening to standard error."""
    if volume() is not Volume.QUIET:
        complain(text)


def detail(text: str) -> None:
    """Write what people seldom need to standard error, with --verbose alone."""
    if volume() is Volume.VERBOSE:
        complain(text)


def complain(text: str, style: str | None = None) -> None:
    """Write a line to standard error. If that cannot be written, the command goes on without the line."""
    with suppress(OSError):
        err.write_line(visible(text), style)


@contextmanager
def _output_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError.of(error) from error


def show_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, optional: Sequence[str] = ()
) -> set[str]:
    """Write a table: framed on a terminal; in a pipe plain columns, one line for each row.

    Returns the names of the columns that are left out: those of `optional`, in that order, until the others fit the
    terminal. A table that does not fit then is written as a few lines for each row."""
    if volume() is Volume.QUIET:
        return set()
    cells = [[visible_line(cell) for cell in row] for row in rows]
    with _output_errors():
        if out.is_terminal:
            return _print_framed(visible_line(title), columns, cells, optional)
        for line in _plain_lines(title, columns, cells):
            out.write_line(line)
    return set()


def _print_framed(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], optional: Sequence[str]
) -> set[str]:
    from rich.box import HEAVY_HEAD
    from rich.table import Table
    from rich.text import Text

    from .wrap import folded, layout, stacked

    chosen = layout(columns, rows, out.console.width, optional)
    if not chosen.shown:
        for line in [title] * bool(title) + [line for row in rows for line in stacked(columns, row)]:
            out.write_line(line)
        return set()
    table = Table(title=Text(title, "italic") if title else None, box=HEAVY_HEAD)
    for n, width in zip(chosen.shown, chosen.widths, strict=True):
        table.add_column(folded(columns[n], width), width=width, no_wrap=True)
    for row in rows:
        table.add_row(*(Text(folded(row[n], width)) for n, width in zip(chosen.shown, chosen.widths, strict=True)))
    out.console.print(table, markup=False)
    return {name for n, name in enumerate(columns) if n not in chosen.shown}


def _plain_lines(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The title, the names of the columns, and the rows; each column is as wide as its widest cell."""
    from .wrap import cell_width

    if title:
        yield visible_line(title)
    lines = [columns, *rows]
    widths = [max(map(cell_width, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = (cell + " " * (width - cell_width(cell)) for cell, width in zip(line, widths, strict=True))
        yield "  ".join(padded).rstrip()
