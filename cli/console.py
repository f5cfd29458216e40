"""How the command line speaks: bars on a terminal, plain lines in a pipe, and no text of a file as it is."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self

from rich.box import HEAVY_HEAD
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from ..schemas.errors import CascadeError
from .escape import visible, visible_line
from .translate import in_options

HOUR = 3600.0  # seconds; images may take minutes each, of which an estimate needs several
PIPE_WIDTH = 1000  # more than any row takes, so that none is broken

FAILED, WRONG_USAGE = 1, 2
DESCRIPTION = TextColumn("{task.description}", markup=False)


class OutputError(CascadeError):
    """Standard output cannot be written."""

    unread = False  # its reader went away: nobody is there to be told

    @classmethod
    def of(cls, error: OSError) -> Self:
        made = cls(f"standard output: cannot be written: {error.strerror}")
        made.unread = isinstance(error, BrokenPipeError)
        return made


class Terminal(Console):
    """A console that leaves it to its caller what a closed pipe means."""

    def on_broken_pipe(self) -> None:
        raise


out = Terminal(highlight=False, emoji=False, soft_wrap=True)
err = Terminal(stderr=True, highlight=False, emoji=False, soft_wrap=True)


def say(text: str, console: Console = out) -> None:
    """A line for the person, on standard output. Raises OutputError when that cannot be written."""
    _print(console, visible(text))


def note(text: str) -> None:
    """Something the person should know that is no error, on standard error."""
    complain(f"note: {in_options(text)}", style="yellow")


def complain(text: str, style: str | None = None) -> None:
    """A line on standard error. Where that cannot be written, nobody can be told so: the work goes on."""
    with suppress(OSError):
        err.print(visible(text), style=style, markup=False)


def _print(console: Console, shown: RenderableType, **how: Any) -> None:
    try:
        console.print(shown, markup=False, **how)
    except OSError as error:
        raise OutputError.of(error) from error


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table: framed on a terminal, plain columns one line a row in a pipe."""
    table = Table(
        title=Text(visible_line(title), "italic") if title else None, box=HEAVY_HEAD if out.is_terminal else None
    )
    for column in columns:
        table.add_column(column, overflow="fold")  # paths and names are to be read whole
    for row in rows:
        table.add_row(*(Text(visible_line(cell)) for cell in row))
    if out.is_terminal:
        _print(out, table)
    else:
        _print(Terminal(width=PIPE_WIDTH, highlight=False, emoji=False), table, no_wrap=True)


@contextmanager
def byte_progress() -> Iterator[Callable[[str, int], Callable[[int], object]]]:
    """Progress over bytes: call the yielded function with a file's name and size, then what it returns with
    each number of bytes done."""
    if not err.is_terminal:

        def announce(name: str, total: int) -> Callable[[int], object]:
            complain(f"{name}: {total / 1e6:.1f} MB")
            return lambda done: None

        yield announce
        return
    columns = (DESCRIPTION, BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=err) as bars:

        def start(name: str, total: int) -> Callable[[int], object]:
            task = bars.add_task(visible_line(name), total=total)
            return lambda done: bars.advance(task, done)

        yield start


@contextmanager
def step_progress() -> Iterator[Callable[[str, int, int], object]]:
    """Progress over steps: call the yielded function with a name, the steps done and their total."""
    if not err.is_terminal:
        yield lambda name, done, total: complain(f"{name}: {total} steps") if done == total else None
        return
    columns = (DESCRIPTION, BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=err) as bars:
        tasks: dict[str, Any] = {}

        def update(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(visible_line(name), total=total)
            bars.update(tasks[name], completed=done)

        yield update


@dataclass(frozen=True)
class BatchBars:
    """`image` is called with the number of images done, `step` as what `step_progress` yields, `say` with a line."""

    image: Callable[[int], object]
    step: Callable[[str, int, int], object]
    say: Callable[[str], object]


@contextmanager
def batch_progress(total: int) -> Iterator[BatchBars]:
    """Progress over `total` images, and over the steps of those in work. In a pipe, where a line tells of each image,
    there are no bars."""
    if not err.is_terminal:
        yield BatchBars(lambda done: None, lambda name, done, steps: None, say)
        return
    columns = (DESCRIPTION, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=err, speed_estimate_period=HOUR) as bars:
        images = bars.add_task("images", total=total)
        tasks: dict[str, Any] = {}

        def step(name: str, done: int, steps: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(visible_line(name), total=steps)
            elif done == 1:  # the next images
                bars.reset(tasks[name], total=steps)
            bars.update(tasks[name], completed=done)

        # A line on the bars' own terminal goes through their console, which makes room for it.
        lines = err if out.is_terminal else out
        yield BatchBars(lambda done: bars.update(images, completed=done), step, lambda text: say(text, lines))
