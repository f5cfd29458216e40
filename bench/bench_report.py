"""Reports of measurements: cases, their runs, and ratios within a round."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Case:
    """A command to measure."""

    name: str
    what: str  # its description
    command: tuple[str, ...]
    nbytes: int | None = None  # bytes of the source that it reads; None: only a part
    cold: bool = False  # whether the source's pages are dropped from the page cache first
    own_clock: bool = False  # whether the command prints its seconds itself


@dataclass(frozen=True)
class Run:
    """One measurement."""

    seconds: float
    peak_rss: int  # bytes
    cached: float | None  # share of the source in the page cache just before; None: unknown


@dataclass(frozen=True)
class BenchReport:
    """The runs of every case in order, with the source and the machine."""

    machine: dict[str, Any]
    source: dict[str, Any]
    cases: tuple[Case, ...]
    runs: dict[str, list[Run]]
    pairs: Pairs  # of cases; `ratios` divides the seconds of the first by those of the second
    floor_rss: int  # peak memory of a process that does nothing, in bytes

    def ratios(self) -> dict[str, list[float]]:
        """The ratio of seconds of each of `pairs`, one for each round."""
        return {
            f"{first} / {second}": [
                a.seconds / b.seconds for a, b in zip(self.runs[first], self.runs[second], strict=True)
            ]
            for first, second in self.pairs
            if first in self.runs and second in self.runs
        }

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for json.dumps."""
        return {
            "machine": self.machine,
            "source": self.source,
            "floor_rss_bytes": self.floor_rss,
            "cases": {case.name: _summary(case, self.runs[case.name]) for case in self.cases},
            "ratios": {name: {"each": each, "median": median(each)} for name, each in self.ratios().items()},
        }


def _summary(case: Case, runs: Sequence[Run]) -> dict[str, Any]:
    return {
        "what": case.what,
        **spread([run.seconds for run in runs]),
        "megabytes_per_second": case.nbytes / median(run.seconds for run in runs) / 1e6 if case.nbytes else None,
        "peak_rss_bytes": max(run.peak_rss for run in runs),
        "cached": [run.cached for run in runs],
    }


def spread(seconds: list[float]) -> dict[str, Any]:
    """Every time, and the median, least and greatest of them."""
    return {"seconds": seconds, "median": median(seconds), "min": min(seconds), "max": max(seconds)}
