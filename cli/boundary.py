"""Ends every failed command in one line and an exit code, never in a traceback."""

import errno
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from io import StringIO
from pathlib import Path
from types import TracebackType
from typing import Any

import click

from ..schemas.errors import CascadeError, UsageError, reraise_interrupt
from ..storage.locks import say_waiting
from .console import FAILED, WRONG_USAGE, OutputError, complain, note
from .escape import escaped, visible_line
from .lazy import LazyGroup
from .options_elsewhere import meant_instead
from .signals import SHELL_BASE, Stopped, ending, received
from .translate import in_options

UNREAD = SHELL_BASE + signal.SIGPIPE  # the exit code that shells show for a program whose reader went away
PANIC = "pyo3_runtime"  # the module of the BaseException that a panic in a Rust library becomes

NULL = "embedded null"  # Python's message for a path with a null character, which files of prompts may name

ADVICE = {
    errno.EACCES: "check who may read and write there",
    errno.EPERM: "check who may read and write there",
    errno.EROFS: "choose a place that can be written",
    errno.ENOSPC: "make room, then run the same again",
    errno.EDQUOT: "make room, then run the same again",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "a link there leads to itself; remove it",
    errno.EMFILE: "allow more open files with `ulimit -n`",
    errno.EIO: "the disk cannot be read; check it",
    errno.ESTALE: "the network drive lost it; run the same again",
}


class CascadeGroup(LazyGroup):
    """Ends each command in an exit code; `--debug` lets the traceback of an error through."""

    def main(self, *arguments: Any, **extra: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError):  # closed, or not a text file
                stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        say_waiting.set(note)
        try:
            with ending():
                return super().main(*arguments, **extra)
        finally:
            _silence_what_cannot_be_written()

    def make_context(self, *arguments: Any, **extra: Any) -> click.Context:
        try:
            return super().make_context(*arguments, **extra)
        except OSError as error:  # --help and --version are printed here
            raise SystemExit(answer(OutputError.of(error))) from error

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            if isinstance(error, click.NoSuchOption) and (better := meant_instead(error)):
                raise better from error
            ctx.exit(_show_usage(error))
        except (click.exceptions.Exit, click.Abort):
            raise
        except BaseException as error:
            if not isinstance(error, Exception | KeyboardInterrupt) and type(error).__module__ != PANIC:
                raise
            stop = _interruption(error)
            if ctx.params.get("debug") and not stop and not _unread(error):
                sys.excepthook = _show_traceback
                raise
            ctx.exit(answer(stop or error))


def _show_usage(error: click.ClickException) -> int:
    """Write click's message to standard error, broken between words on a terminal; returns the exit code."""
    written = StringIO()
    error.show(written)
    for line in written.getvalue().splitlines():
        complain(line)
    return error.exit_code


def answer(error: BaseException) -> int:
    """Write the error's message to standard error and return the exit code."""
    if isinstance(error, KeyboardInterrupt):
        complain("interrupted; no half-written output is left")
        return error.exit_code if isinstance(error, Stopped) else Stopped(signal.SIGINT).exit_code
    if _unread(error):
        return UNREAD
    complain(f"error: {describe(error)}", style="red")
    return WRONG_USAGE if isinstance(error, UsageError) else FAILED


def _unread(error: BaseException) -> bool:
    return isinstance(error, OutputError) and error.unread


def describe(error: BaseException) -> str:
    """The message for an error, with the file that it is about."""
    if isinstance(error, CascadeError):
        return in_options(str(error))
    for kinds, text in TEXTS:
        if isinstance(error, kinds):
            return text(error)
    if type(error).__module__ == PANIC:
        return f"a library gave up: {_first_line(error)}{_at_hand(error)}"
    if isinstance(error, ValueError) and NULL in str(error):
        return f"a path with a null character, which no file has: {_first_line(error)}{_at_hand(error)}"
    return (
        f"this is a bug of cascadekit, please report it: {type(error).__name__}: {_first_line(error)}"
        f"{_at_hand(error)}; `cascadekit --debug ...` shows where it arose"
    )


def _os_error(error: OSError) -> str:
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes | Path)]
    said = error.strerror or _first_line(error) or type(error).__name__
    if "temporary directory" in said:
        return f"{said}; let TMPDIR name a folder that can be written"
    advice = f"; {ADVICE[error.errno]}" if error.errno in ADVICE else ""
    return f"{visible_line(' -> '.join(names))}: {said}{advice}" if names else f"{said}{_at_hand(error)}{advice}"


def _with_place(said: str) -> Callable[[Any], str]:
    return lambda error: f"{said}: {_first_line(error) or type(error).__name__}{_at_hand(error)}"


TEXTS: tuple[tuple[type[BaseException], Callable[[Any], str]], ...] = (
    (OSError, _os_error),
    (UnicodeError, _with_place("text in another encoding than expected")),
    (RecursionError, _with_place("nested too deep")),
    (OverflowError, _with_place("a number is too large")),
    (MemoryError, _with_place("memory does not suffice")),
)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def _at_hand(error: BaseException) -> str:
    """The file that the innermost function with a path among its variables was working on."""
    import traceback

    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        for value in frame.f_locals.values():
            if isinstance(value, Path) and value.name:
                return f" (while working on {visible_line(str(value))})"
    return ""


def _interruption(error: BaseException) -> KeyboardInterrupt | None:
    """The interruption behind an error: libraries turn one into errors of their own."""
    try:
        reraise_interrupt(error)
    except KeyboardInterrupt as stop:
        return stop
    return received()


def _show_traceback(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    """Print a traceback with control characters escaped; Python's own hook would print them as they are."""
    import traceback

    sys.stderr.write(escaped("".join(traceback.format_exception(kind, error, at))))


def _silence_what_cannot_be_written() -> None:
    """Redirect an unwritable standard output: at its end Python writes the rest, and would print errors of its own."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
