"""Starts processes, each measured on its own, with the files they read in the page cache or out of it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..schemas.callbacks import Say
from ..schemas.errors import ConversionError
from .report import Case, Run

PACKAGE = (sys.executable, "-c", "from cascadekit.cli import main; main()")

BLOCK = 1 << 24
CACHE_SAMPLES = 256

# A child counts as large as the process that started it was at that moment, so a small one starts each.
LAUNCHER = """
import os, sys, time
start = time.perf_counter()
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(child, 0)
print(time.perf_counter() - start, usage.ru_maxrss, os.waitstatus_to_exitcode(status))
"""


def launch(
    command: Sequence[str],
    *,
    own_clock: bool = False,
    environment: Mapping[str, str] | None = None,
    label: str | None = None,
) -> tuple[Run, list[str]]:
    """Run a command to its end: what it took, and the lines it printed. With `own_clock` the last of them are its
    seconds. Raises ConversionError when it fails, which calls the command `label`."""
    launcher = (sys.executable, "-I", "-S", "-c", LAUNCHER, *command)
    ended = subprocess.run(
        launcher, capture_output=True, text=True, check=False, env={**os.environ, **(environment or {})}
    )
    *printed, last = ended.stdout.splitlines() or [""]
    seconds, kilobytes, code = (*last.split(), "", "", "")[:3]
    if code != "0":
        reason = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ConversionError(f"{label or ' '.join(command)[:200]}: failed: {reason}")
    return Run(float(printed[-1] if own_clock else seconds), int(kilobytes) * 1024, None), printed


def measure_all(cases: Sequence[Case], file: Path, output: Path, runs: int, say: Say) -> dict[str, list[Run]]:
    """`runs` rounds of all `cases`, which read `file` and write `output`; that is removed after each."""
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
        drop_from_cache(file)  # looking made the kernel read ahead
    try:
        run, _ = launch(case.command, own_clock=case.own_clock)
    finally:
        shutil.rmtree(output, ignore_errors=True)
        output.unlink(missing_ok=True)
    return Run(run.seconds, run.peak_rss, cached)


def floor_rss() -> int:
    """What a process that does nothing counts as, in bytes."""
    return launch(("true",))[0].peak_rss


def drop_from_cache(path: Path) -> None:
    """Have the kernel forget the file's pages. A disk's own cache, or that of a machine around this one, is out of
    reach."""
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


def cached_share(path: Path) -> float | None:
    """The share of the file that lies in the page cache, from samples; None where the kernel does not say."""
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
