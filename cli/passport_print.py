"""Prints the passports of files, for the commands that inspect."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from .console import say

if TYPE_CHECKING:
    from ..converters.passport_check import PassportState


def show_passports(states: "Iterable[PassportState]", root: Path) -> None:
    """Print a line for each passport: the file below `root`, what it was made of, and whether it is as written."""
    from ..converters.passport_check import described

    for state in states:
        is_below = state.path != root and state.path.is_relative_to(root)
        name = state.path.relative_to(root) if is_below else state.path.name
        say(f"passport of {name}: {f'{described(state.passport)}; ' if state.passport else ''}{state.text}")
