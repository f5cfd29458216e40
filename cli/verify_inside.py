"""The verify command looking into graphs: bisection, and the ranges of activations."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..schemas.stages import Stage
from .console import note, say, show_table

if TYPE_CHECKING:
    from ..parity.inside.bisect import Bisection
    from ..parity.inside.ranges import Advice
    from ..parity.reference.engine import TorchEngine
    from ..schemas.report import DepthEntry, RangeEntry
    from ..storage.bundle import Bundle

RANGE_COLUMNS = ("block", "largest", "in", "smallest usual", "bits below fp16's end", "lost in fp16", "bf16", "fp8")
ERROR_COLUMNS = ("precision", "predicted", "measured", "worst block", "predicted there", "measured there")
SHOWN = 12  # blocks, those nearest to the end of fp16; --json lists all


@dataclass(frozen=True)
class Inside:
    """What was seen; false when a part of a graph is faulty."""

    bisections: "Sequence[Bisection]" = ()
    advices: "Sequence[Advice]" = field(default_factory=list)

    def __bool__(self) -> bool:
        return all(self.bisections)

    def to_json(self) -> dict[str, Any]:
        from ..parity.inside.ranges import export_options

        found: dict[str, Any] = {}
        if self.bisections:
            found["bisection"] = [bisection.to_json() for bisection in self.bisections]
        if self.advices:
            found["ranges"] = [advice.to_json() for advice in self.advices]
            found["export_options"] = export_options(self.advices)
        return found

    def depth_entries(self) -> "list[DepthEntry]":
        from ..parity.report.build import depth_entries

        return [entry for found in self.bisections for entry in depth_entries(found.stage, found.points)]

    def range_entries(self) -> "list[RangeEntry]":
        return [entry for advice in self.advices for entry in advice.entries()]


def look_inside(
    bundle: "Bundle", stages: Sequence[Stage], reference: "TorchEngine", *, bisect: bool, ranges: bool
) -> Inside:
    """Each stage in turn, one in memory at a time."""
    from ..parity.inside.bisect import bisect_stage
    from ..parity.inside.ranges import advise
    from ..runtime.text.tokenizer import ClipTokenizer

    tokenizer = ClipTokenizer.open(bundle.tokenizer)
    bisections, advices = [], []
    for stage in stages:
        if bisect:
            note(f"comparing the parts of {stage}")
            bisections.append(bisect_stage(bundle, stage, reference, tokenizer))
        if ranges:
            note(f"watching {stage}")
            advices.append(advise(bundle.entry(stage), stage, reference, tokenizer))
    return Inside(bisections, advices)


def print_inside(inside: Inside) -> None:
    for bisection in inside.bisections:
        for line in (*([f"{bisection.stage}: {bisection.note}"] if bisection.note else ()), *bisection.described()):
            say(line)
    if inside.bisections:
        say("no part differs" if inside else "DIFFERENT")
    for advice in inside.advices:
        _print_advice(advice)
    if inside.advices:
        from ..parity.inside.ranges import export_options

        say(f"export with: {' '.join(export_options(inside.advices))}")


def _print_advice(advice: "Advice") -> None:
    rows = [
        (
            block.name,
            f"{block.max_abs:.3g}",
            block.where,
            f"{block.usual:.1e}",
            f"{block.margin:.1f}",
            *(f"{block.lost(kind):.1f}" for kind in ("fp16", "bf16", "fp8")),
        )
        for block in advice.tightest(SHOWN)
    ]
    show_table(f"{advice.stage}: {len(advice.blocks)} blocks, those nearest to the end of fp16", RANGE_COLUMNS, rows)
    errors = [
        (
            kind,
            f"{error.predicted:.1e}",
            "-" if error.measured is None else f"{error.measured:.1e}",
            error.worst,
            f"{error.worst_predicted:.1e}",
            "-" if error.worst_measured is None else f"{error.worst_measured:.1e}",
        )
        for kind, error in advice.errors.items()
    ]
    show_table(f"{advice.stage}: relative L2 error by precision", ERROR_COLUMNS, errors)
    for line in advice.described():
        say(line)
