"""Describes what a conversion, export, merge or build would read and write, before anything is written."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class FileSize:
    """A file and its bytes; `about` where the bytes are an estimate or an upper bound."""

    path: str
    bytes: int
    about: bool = False


@dataclass(frozen=True)
class Forecast:
    """The files that would be read, and those that would be written below `output` ("." where it is the output itself).

    `seconds` is an estimate; None where no honest one can be made, as for work that depends on the disk alone."""

    output: Path
    reads: tuple[FileSize, ...]
    writes: tuple[FileSize, ...]
    seconds: float | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The forecast as plain values."""
        return {
            "output": str(self.output),
            "reads": [vars(file) for file in self.reads],
            "writes": [vars(file) for file in self.writes],
            "seconds": None if self.seconds is None else round(self.seconds, 1),
            "notes": list(self.notes),
        }


OnPlan = Callable[[Forecast], object]
"""Called when everything was checked and nothing is written yet. An exception that it raises ends the work there."""
