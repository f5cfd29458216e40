"""Measures exports, and a copy of the same weights."""

from pathlib import Path

from ..schemas.callbacks import Say, ignored
from .bench_report import BenchReport, Case
from .convert_speed import COPY
from .process import PACKAGE, bench_folder, floor_rss, measure_all
from .standins import describe, source_file

PAIRS = (("link", "cp"), ("copy", "cp"), ("link", "copy"))


def bench_export(
    work: Path,
    *,
    network: str = "prior-lite",
    dtype: str = "BF16",
    source: Path | None = None,
    runs: int = 3,
    say: Say = ignored,
) -> BenchReport:
    """Measure exports of `source`, or of a stand-in for `network` in `dtype`, in a folder below `work`.

    The folder is removed at the end. `say` is called with a line for each step.
    Raises UsageError for a wrong source or work folder, ConversionError when a command fails."""
    with bench_folder(work) as (folder, machine):
        component, file = source_file(folder, network, dtype, given=source, outputs=1, say=say)
        output = folder / "output"
        cases = _measured_commands(file, output)
        return BenchReport(
            machine=machine,
            source=describe(component, file, generated=source is None),
            cases=cases,
            runs=measure_all(cases, file, output, runs, say),
            pairs=PAIRS,
            floor_rss=floor_rss(),
        )


def _measured_commands(file: Path, output: Path) -> tuple[Case, ...]:
    """Everything to measure, in the order of a round."""
    size, export = file.stat().st_size, (*PACKAGE, "export", str(file), "-o", str(output), "--no-hash", "--weights")
    return (
        Case("link", "cascadekit export --no-hash --weights link", (*export, "link"), size),
        Case("copy", "cascadekit export --no-hash --weights copy", (*export, "copy"), size),
        Case("cp", "cp FILE COPY && sync COPY", ("sh", "-c", COPY, "sh", str(file), str(output)), size),
    )
