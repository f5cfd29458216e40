"""Starts and measures processes, with the files that they read in the page cache or out of it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..schemas.callbacks import Say
from ..schemas.errors import ConversionError, UsageError
from ..storage.bundle import open_bundle
from .bench_report import Case, Run
from .machine import describe_machine

PACKAGE = (sys.executable, "-c", "from cascadekit.cli import main; main()")

BLOCK = 1 << 24
CACHE_SAMPLES = 256

# The peak memory of a child includes the memory of its parent at its start, so a small process starts each child.
LAUNCHER = """
import os, sys, time
start = time.perf_counter()
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(child, 0)
print(time.perf_counter() - start, usage.ru_maxrss, os.waitstatus_to_exitcode(status))
"""


@dataclass(frozen=True)
class WorkerJob:
    """A job for the function `main` of a module of this package, in a process of its own. Subclasses add its fields."""

    threads: int  # 0: as many as the libraries choose
    runs: int  # measured runs, after one that is not measured

    @property
    def environment(self) -> dict[str, str]:
        """Settings that libraries read when they are loaded."""
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS") if self.threads else ()
        return dict.fromkeys(names, str(self.threads))

    def work(self, label: str) -> dict[str, Any]:
        """Run the job; returns the JSON that the worker printed, and its peak memory in bytes as "peak_rss".

        Raises ConversionError when the process fails or prints no JSON."""
        call = f"from {type(self).__module__} import main; main()"
        command = (sys.executable, "-c", call, json.dumps(asdict(self)))
        run, printed = launch(command, environment=self.environment, label=label)
        try:
            return {**json.loads(printed[-1]), "peak_rss": run.peak_rss}
        except (IndexError, ValueError) as error:
            raise ConversionError(f"{label}: its process ended without a result: {error}") from error


@contextmanager
def bench_folder(work: Path, *, peer: bool = False) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder below `work` that is removed at the end, and the description of the machine for the report.

    Raises UsageError when `work` is no folder."""
    if not work.is_dir():
        raise UsageError(f"{work}: not a folder; give one on the disk to measure")
    with TemporaryDirectory(prefix="cascadekit-bench-", dir=work) as name:
        folder = Path(name).absolute()
        machine = describe_machine(folder, peer=peer)
        yield folder, machine
        machine["load_average"]["after"] = os.getloadavg()[0]


def launch(
    command: Sequence[str],
    *,
    own_clock: bool = False,
    environment: Mapping[str, str] | None = None,
    label: str | None = None,
) -> tuple[Run, list[str]]:
    """Run a command to its end; returns its measurement and the lines that it printed.

    With `own_clock` the last line is the seconds that the command measured itself. Raises ConversionError when the
    command fails; the message calls it `label`."""
    launcher = (sys.executable, "-I", "-S", "-c", LAUNCHER, *command)
    ended = subprocess.run(
        launcher, capture_output=True, text=True, check=False, env={**os.environ, **(environment or {})}
    )
    *printed, last = ended.stdout.splitlines() or [""]
    seconds, kilobytes, code = (*last.split(), "", "", "")[:3]
    if code != "0":
        reason = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConversionError(f"{label or ' '.join(command)[:200]}: failed: {reason}")
    return Run(float(printed[-1] if own_clock else seconds), int(kilobytes) * 1024, None), printed


def measure_all(cases: Sequence[Case], file: Path, output: Path, runs: int, say: Say) -> dict[str, list[Run]]:
    """Measure `runs` rounds of all `cases`, which read `file` and write `output`; the output is removed after each."""
    measured: dict[str, list[Run]] = {case.name: [] for case in cases}
    for case in cases:
        if case.nbytes is None:
            launch(case.command)  # programs and libraries come from the page cache in every round
    for number in range(1, runs + 1):
        for case in cases:
            run = _measure(case, file, output)
            say(f"round {number} of {runs}: {case.name} {run.seconds:.3f} s")
            measured[case.name].append(run)
    return measured


def _measure(case: Case, file: Path, output: Path) -> Run:
    drop_from_cache(file) if case.cold else bring_into_cache(file)
    cached = cached_share(file)
    if case.cold:
        drop_from_cache(file)  # cached_share made the kernel read ahead
    try:
        run, _ = launch(case.command, own_clock=case.own_clock)
    finally:
        shutil.rmtree(output, ignore_errors=True)
        output.unlink(missing_ok=True)
    return Run(run.seconds, run.peak_rss, cached)


def floor_rss() -> int:
    """The peak memory of a process that does nothing, in bytes."""
    return launch(("true",))[0].peak_rss


def drop_from_cache(path: Path) -> None:
    """Drop the file's pages from the kernel's cache. The caches of a disk or of a host machine stay."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bring_into_cache(path: Path) -> None:
    """Read the file unless all of it is in the page cache."""
    if cached_share(path) == 1:
        return
    with path.open("rb", buffering=0) as file:
        while file.read(BLOCK):
            pass


def bundle_files(root: Path) -> Sequence[Path]:
    """The graphs and weights of a bundle."""
    entries = open_bundle(root).manifest.stages.values()
    return sorted({root / file.path for entry in entries for file in entry.files})


def cached_share(path: Path) -> float | None:
    """The share of the file in the page cache, from samples; None when the kernel does not report it."""
    size = path.stat().st_size
    found = 0
    with path.open("rb") as file:
        for number in range(CACHE_SAMPLES):
            try:
                os.preadv(file.fileno(), [bytearray(1)], size * number // CACHE_SAMPLES, os.RWF_NOWAIT)
            except BlockingIOError:
                continue
            except OSError:
                return None
            found += 1
    return found / CACHE_SAMPLES
