"""Turns comparisons and bisections into the entries of a report."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from ...schemas.report import ComparisonEntry, DepthEntry, HistogramEntry, RangeEntry
from ..comparison import Comparison
from ..value_counts import HISTOGRAM_EDGES

if TYPE_CHECKING:
    from ..inside.bisection import Bisection
    from ..inside.ranges import RangeAdvice


def comparison_entry(comparison: Comparison) -> ComparisonEntry:
    """A comparison as plain values."""
    histogram = HistogramEntry(edges=HISTOGRAM_EDGES, **asdict(comparison.histogram))
    figures = {**asdict(comparison), "histogram": histogram, "passed": bool(comparison)}
    return ComparisonEntry(failures=comparison.failures, **figures)


def depth_entries(bisection: "Bisection") -> list[DepthEntry]:
    """The parts of a stage's graph in the order they run."""
    return [
        DepthEntry(
            stage=bisection.stage,
            name=part.label,
            own=part.relative_l2,
            floor=part.floor,
            accumulated=part.accumulated,
            faulty=part.faulty,
        )
        for part in bisection.parts
    ]


def range_entries(advice: "RangeAdvice") -> list[RangeEntry]:
    """The largest magnitude in each block of a stage."""
    return [
        RangeEntry(stage=advice.stage, name=block.name, max_abs=block.max_abs, precision=advice.computed)
        for block in advice.blocks
    ]
