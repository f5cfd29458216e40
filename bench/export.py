"""Measures exports, beside a copy of the same weights."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from ..schemas.callbacks import Say
from ..schemas.errors import UsageError
from .convert import COPY
from .machine import describe_machine
from .process import PACKAGE, floor_rss, measure_all
from .report import Case, Report
from .standins import describe, source_file

PAIRS = (("link", "cp"), ("copy", "cp"), ("link", "copy"))


def bench_export(
    work: Path,
    *,
    network: str = "prior-lite",
    dtype: str = "BF16",
    source: Path | None = None,
    runs: int = 3,
    say: Say = lambda text: None,
) -> Report:
    """Measure exports of `source`, or of a stand-in for `network` in `dtype`, in a folder below `work` that is removed
    at the end; `say` hears what is going on.

    Raises UsageError when the source or the work folder is none, ConversionError when a command fails."""
    if not work.is_dir():
        raise UsageError(f"{work}: not a folder; give one on the disk to measure")
    with TemporaryDirectory(prefix="cascadekit-bench-", dir=work) as name:
        folder = Path(name).absolute()
        machine = describe_machine(folder)
        component, file = source_file(folder, network, dtype, source, 1, say)
        output = folder / "output"
        measured = measure_all(cases := _cases(file, output), file, output, runs, say)
        machine["load_average"]["after"] = os.getloadavg()[0]
        return Report(machine, describe(component, file, generated=source is None), cases, measured, PAIRS, floor_rss())


def _cases(file: Path, output: Path) -> tuple[Case, ...]:
    """Everything to measure, in the order of a round."""
    size, export = file.stat().st_size, (*PACKAGE, "export", str(file), "-o", str(output), "--no-hash", "--weights")
    return (
        Case("link", "cascadekit export --no-hash --weights link", (*export, "link"), size),
        Case("copy", "cascadekit export --no-hash --weights copy", (*export, "copy"), size),
        Case("cp", "cp FILE COPY && sync COPY", ("sh", "-c", COPY, "sh", str(file), str(output)), size),
    )
