"""The report of `cascadekit doctor --gpu`: the result of every check, kept as the checks go on."""

import platform
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from time import perf_counter
from typing import Any

from ..runtime.examine_machine import Findings
from ..schemas.created_by import created_by
from ..schemas.errors import CascadeError

PASSED, FAILED, NOT_CHECKED = "passed", "failed", "not checked"


@dataclass(frozen=True)
class GpuCheck:
    """The result of one check; `numbers` are its measurements, `trace` is the traceback of a failure.

    `compares` is true when the check compares outputs of the GPU with those of the CPU."""

    name: str
    result: str
    seconds: float
    detail: str = ""
    compares: bool = False
    numbers: dict[str, Any] = field(default_factory=dict)
    trace: str = ""

    @property
    def done(self) -> bool:
        return self.result != NOT_CHECKED


@dataclass(frozen=True)
class GpuReport:
    """All checks; true when the checks ended, some outputs were compared and no check failed."""

    created: str
    created_by: str
    findings: Findings
    checks: tuple[GpuCheck, ...]
    finished: bool

    def __bool__(self) -> bool:
        compared = [check for check in self.checks if check.done and check.compares]
        return self.finished and bool(compared) and all(check.result != FAILED for check in self.checks)

    @property
    def not_checked(self) -> dict[str, list[str]]:
        """Names of the checks that were not made, by the reason."""
        found: dict[str, list[str]] = {}
        for check in self.checks:
            if not check.done:
                found.setdefault(check.detail, []).append(check.name)
        return found

    @property
    def verdict(self) -> str:
        counts = {result: sum(c.result == result for c in self.checks) for result in (PASSED, FAILED, NOT_CHECKED)}
        return ", ".join(f"{count} {result}" for result, count in counts.items())

    def to_json(self) -> dict[str, Any]:
        return {"format": "cascadekit-gpu-report", "version": 1, "passed": bool(self), **asdict(self)}


Keep = Callable[[GpuReport], object]
OnCheck = Callable[[GpuCheck], object]


class CheckRecorder:
    """Makes checks and keeps the result of each, whatever exception it raises."""

    def __init__(self, findings: Findings, keep: Keep, on_check: OnCheck) -> None:
        self.findings = findings
        self.checks: list[GpuCheck] = []
        self._keep = keep
        self._on_check = on_check

    def report(self, *, finished: bool) -> GpuReport:
        created = datetime.now(UTC).isoformat(timespec="seconds")
        made_by = f"{created_by()}, Python {platform.python_version()}"
        report = GpuReport(created, made_by, self.findings, tuple(self.checks), finished)
        self._keep(report)
        return report

    def do(self, name: str, work: Callable[[], dict[str, Any]], *, compares: bool = False) -> bool:
        """Run the check `work`, which returns its measurements; returns whether it passed."""
        started = perf_counter()
        try:
            numbers = work()
        except Exception as error:  # the exceptions of GPU libraries belong in the report
            detail = str(error) if isinstance(error, CascadeError) else f"{type(error).__name__}: {error}"
            seconds = perf_counter() - started
            return self._add(GpuCheck(name, FAILED, seconds, detail, compares, trace=traceback.format_exc()))
        return self._add(GpuCheck(name, PASSED, perf_counter() - started, compares=compares, numbers=numbers))

    def skip(self, names: Sequence[str], reason: str) -> None:
        for name in names:
            self._add(GpuCheck(name, NOT_CHECKED, 0.0, reason))

    def _add(self, check: GpuCheck) -> bool:
        self.checks.append(check)
        self.report(finished=False)
        self._on_check(check)
        return check.result == PASSED
