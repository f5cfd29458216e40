"""Prints which Linears `export --quantize` stored in 8 or 4 bits."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..schemas.stages import Stage
from .console import Volume, say, show_table, volume

if TYPE_CHECKING:
    from ..converters.export.quantize_choice import QuantizationChoice


def show_choices(choices: "Mapping[Stage, QuantizationChoice]") -> None:
    """Print a line for each stage, or with --verbose a table of its Linears."""
    from ..converters.export.quantize_stage import COLUMNS, summary, table_rows

    for stage, choice in choices.items():
        if volume() is not Volume.VERBOSE:
            say(f"{stage}: {summary(choice)}")
            continue
        show_table(f"{stage} in {choice.scheme.kind}", COLUMNS, table_rows(choice))
