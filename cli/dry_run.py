"""The option --dry-run: everything is checked, the plan is printed, and nothing is written."""

from collections.abc import Iterator
from contextlib import contextmanager

import click

from ..schemas.forecast import FileSize, Forecast, OnPlan
from .console import note, say, say_json
from .progress import in_words

SHOWN = 12  # files of a list


class _PlannedError(Exception):
    """Ends a library function before it writes."""

    def __init__(self, forecast: Forecast) -> None:
        super().__init__()
        self.forecast = forecast


@contextmanager
def plan_only(dry_run: bool, *, as_json: bool) -> Iterator[OnPlan | None]:
    """Yield the `on_plan` of a library function; None without --dry-run.

    With --dry-run the plan is printed, and the command ends with exit code 0."""
    if not dry_run:
        yield None
        return

    def stop(forecast: Forecast) -> None:
        raise _PlannedError(forecast)

    try:
        yield stop
    except _PlannedError as planned:
        if as_json:
            say_json({"dry_run": True, **planned.forecast.to_json()})
        else:
            _print(planned.forecast)
        click.get_current_context().exit(0)


def _print(forecast: Forecast) -> None:
    for text in forecast.notes:
        note(text)
    say(f"would read {_total(forecast.reads)}:")
    _print_files(forecast.reads)
    say(f"would write {_total(forecast.writes)} to {forecast.output}:")
    _print_files(forecast.writes)
    took = "" if forecast.seconds is None else f"; it would take about {in_words(forecast.seconds)}"
    say(f"dry run: nothing was written{took}")


def _print_files(files: tuple[FileSize, ...]) -> None:
    for file in files[:SHOWN]:
        say(f"  {_size(file.bytes):>9}  {file.path}")
    if len(files) > SHOWN:
        say(f"  and {len(files) - SHOWN} more; --json lists all")


def _total(files: tuple[FileSize, ...]) -> str:
    about = "about " if any(file.about for file in files) else ""
    return f"{about}{_size(sum(file.bytes for file in files))} in {len(files)} file{'' if len(files) == 1 else 's'}"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
