"""Prints the report of a verification as tables and lines."""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import detail, note, say, show_table

if TYPE_CHECKING:
    from ..parity.inside.ranges import RangeAdvice
    from ..parity.results import Report
    from ..parity.tolerances import StageTolerance
    from ..schemas.stages import Stage

PARITY_COLUMNS = ("compared", "max abs", "mean abs", "relative L2", "cosine", "verdict")
LEFT_OUT = ("mean abs", "cosine")  # on a narrow terminal; reports and --json have them
RANGE_COLUMNS = ("block", "largest", "in", "smallest usual", "bits below fp16's end", "lost in fp16", "bf16", "fp8")
ERROR_COLUMNS = ("precision", "predicted", "measured", "worst block", "predicted there", "measured there")
FORWARD = ("stage", "teacher-forced")  # kinds of comparisons of one forward pass
SHOWN = 12  # blocks, those nearest to the end of fp16; --json lists all


def report_json(report: "Report") -> dict[str, Any]:
    """The report as plain values, with the options to export again with where ranges were measured."""
    options = {"export_options": export_options(report.ranges)} if report.ranges else {}
    return {**report.to_json(), **options}


def print_report(report: "Report") -> None:
    """Print whatever the report holds: comparisons, bisections and ranges."""
    if report.comparisons:
        _print_comparisons(report)
    for bisection in report.bisections:
        for line in (*([f"{bisection.stage}: {bisection.note}"] if bisection.note else ()), *bisection.described()):
            say(line)
    if report.bisections:
        say("no part differs" if all(report.bisections) else "DIFFERENT")
    for advice in report.ranges:
        _print_ranges(advice)
    if report.ranges:
        say(f"export with: {' '.join(export_options(report.ranges))}")


def next_steps(report: "Report", bundle: Path, against: Path | None) -> Iterator[str]:
    """The commands to run after a failure; none after a success, and after a look inside the graphs."""
    if report or not report.comparisons or report.bisections:
        return
    model = "MODEL" if against is None else shlex.quote(str(against))
    quoted = shlex.quote(str(bundle))
    stages = dict.fromkeys(str(each.stage) for each in report.comparisons if not each and each.stage)
    if report.differs:
        guilty = [line for line in report.differs if line.partition(":")[0] in stages]
        yield f"the cause may be that the model is not the bundle's: {(guilty or report.differs)[0]}"
        yield f"next: compare with the bundle's own model, or export this one: cascadekit export {model} -o NEW_BUNDLE"
        return
    chosen = "".join(f" --stage {stage}" for stage in stages)
    yield f"next: are its files as exported? cascadekit validate {quoted} --hash"
    yield f"next: which part of a graph differs? cascadekit verify {quoted} --against {model}{chosen} --bisect"


def export_options(advices: Sequence["RangeAdvice"]) -> list[str]:
    """The options of `cascadekit export` that give every stage the precision that suits it."""
    from ..parity.inside.ranges import export_arguments

    arguments = export_arguments(advices)
    options = [f"--precision {stage}={precision}" for stage, precision in arguments["precisions"].items()]
    return [*options, *(f"--fp16-safe {value}" for name, value in arguments.items() if name == "fp16_safe")]


def _print_comparisons(report: "Report") -> None:
    rows = (
        (
            c.name,
            *(f"{figure:.2e}" for figure in (c.max_abs, c.mean_abs, c.relative_l2)),
            f"{c.cosine:.8f}",
            "; ".join(c.failures) or "ok",
        )
        for c in report.comparisons
    )
    for stage, tolerance in report.tolerances.items():
        detail(f"{stage}: {_tolerated(report, stage, tolerance)}")
    if report.left_out:
        note(f"left out, since {report.engine} was built for other sizes: {'; '.join(report.left_out)}")
    show_table(f"{report.engine} against {report.reference}", PARITY_COLUMNS, rows, optional=LEFT_OUT)
    if report.image_psnr is not None:
        needed = f"too low, needed {report.image_psnr_needed:.1f} dB"
        say(f"final image: PSNR {report.image_psnr:.1f} dB" + f" ({needed})" * report.image_failed)
    if report.image_note:
        say(f"{report.image_note} {_judged(report)}")
    say("passed" if report.comparisons_passed else "FAILED")


def _tolerated(report: "Report", stage: "Stage", tolerance: "StageTolerance") -> str:
    """The precision of a stage, the origin of its tolerance, and how much of that its passes take."""
    own = [each for each in report.comparisons if each.stage is stage and each.kind in FORWARD]
    quantised = f", {tolerance.quantization}" if tolerance.quantized_floor else ""
    worst = max((each.relative_l2 for each in own), default=0.0)
    floors = f"{tolerance.factor:g} x {tolerance.floor:.1e} by precision"
    floors += f", {tolerance.quantized_floor:.1e} by quantisation" if tolerance.quantized_floor else ""
    return (
        f"{tolerance.precision}{quantised}, {len(own)} outputs compared, relative L2 {worst:.1e} at most, "
        f"{tolerance.tolerance:.1e} tolerated (the reference's own error: {floors})"
    )


def _judged(report: "Report") -> str:
    """The number of forward passes on equal inputs, and the largest share of a tolerance that one of them takes."""
    passes = [each for each in report.comparisons if each.kind in FORWARD]
    shares = [each.relative_l2 / each.tolerance for each in passes if each.tolerance]
    failed = sum(not each for each in passes)
    worst = f"the worst takes {max(shares):.0%} of its tolerance" if shares else ""
    return f"{len(passes)} passes, {failed} failed" + (f"; {worst}." if worst else ".")


def _print_ranges(advice: "RangeAdvice") -> None:
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
