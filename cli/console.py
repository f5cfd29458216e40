"""How the command line speaks: errors without tracebacks, bars on a terminal, plain lines in a pipe."""

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import click
from rich.box import HEAVY_HEAD
from rich.console import Console
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

from ..schemas.errors import CascadeError, UsageError

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

HOUR = 3600.0  # seconds; images may take minutes each, of which an estimate needs several
PIPE_WIDTH = 1000  # more than any row takes, so that none is broken

FAILED, WRONG_USAGE, INTERRUPTED, TERMINATED = 1, 2, 130, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM, where it is waited for."""


class CascadeGroup(click.Group):
    """Turns a CascadeError into one message and an exit code; `--debug` lets the traceback through."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CascadeError as error:
            if ctx.params.get("debug"):
                raise
            err.print(f"error: {error}", style="red", markup=False)
            ctx.exit(WRONG_USAGE if isinstance(error, UsageError) else FAILED)
        except KeyboardInterrupt as stop:
            err.print("interrupted; no half-written output is left", markup=False)
            ctx.exit(TERMINATED if isinstance(stop, Terminated) else INTERRUPTED)


def say(text: str) -> None:
    """A line for the person, on standard output."""
    out.print(text, markup=False)


def note(text: str) -> None:
    """Something the person should know that is no error, on standard error."""
    err.print(f"note: {text}", style="yellow", markup=False)


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table: framed on a terminal, plain columns one line a row in a pipe."""
    table = Table(title=title or None, box=HEAVY_HEAD if out.is_terminal else None)
    for column in columns:
        table.add_column(column, overflow="fold")  # paths and names are to be read whole
    for row in rows:
        table.add_row(*row)
    if out.is_terminal:
        out.print(table)
    else:
        Console(width=PIPE_WIDTH, highlight=False).print(table, no_wrap=True)


@contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """Ctrl-C and SIGTERM take effect where the yielded function is called; a second one does at once."""
    received: list[int] = []

    def stop() -> None:
        if received:
            raise Terminated if received[0] == signal.SIGTERM else KeyboardInterrupt

    def handle(number: int, frame: object) -> None:
        received.append(number)
        if len(received) > 1:
            stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def byte_progress() -> Iterator[Callable[[str, int], Callable[[int], object]]]:
    """Progress over bytes: call the yielded function with a file's name and size, then what it returns with
    each number of bytes done."""
    if not err.is_terminal:

        def announce(name: str, total: int) -> Callable[[int], object]:
            err.print(f"{name}: {total / 1e6:.1f} MB", markup=False)
            return lambda done: None

        yield announce
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=err) as bars:

        def start(name: str, total: int) -> Callable[[int], object]:
            task = bars.add_task(name, total=total)
            return lambda done: bars.advance(task, done)

        yield start


@contextmanager
def step_progress() -> Iterator[Callable[[str, int, int], object]]:
    """Progress over steps: call the yielded function with a name, the steps done and their total."""
    if not err.is_terminal:
        yield lambda name, done, total: err.print(f"{name}: {total} steps", markup=False) if done == total else None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=err) as bars:
        tasks: dict[str, Any] = {}

        def update(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
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
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=err, speed_estimate_period=HOUR) as bars:
        images = bars.add_task("images", total=total)
        tasks: dict[str, Any] = {}

        def step(name: str, done: int, steps: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=steps)
            elif done == 1:  # the next images
                bars.reset(tasks[name], total=steps)
            bars.update(tasks[name], completed=done)

        # A line on the bars' own terminal goes through their console, which makes room for it.
        lines = err if out.is_terminal else out
        yield BatchBars(
            lambda done: bars.update(images, completed=done), step, lambda text: lines.print(text, markup=False)
        )
