"""Where the time until the first image goes: opening, loading, the first step of each stage, the others, the rest."""

import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from ..schemas.stages import Stage

STAT = Path("/proc/self/stat")
START_FIELD = 19  # of the fields after the name in parentheses: ticks from the system's start to the process's
IMPORTED = time.monotonic()


def since_start() -> float:
    """Seconds since the process was started, to a hundredth; where the system does not say, since this import."""
    try:
        ticks = int(STAT.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[START_FIELD])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return time.monotonic() - IMPORTED


class Timings:
    """Seconds of one cascade, by phase and stage.

    A stage's first step may compile, choose kernels and capture a CUDA graph; it is apart from the others."""

    def __init__(self) -> None:
        self.opened: float | None = None  # from the start of the process until the bundle was open
        self.first_image: float | None = None  # from the start of the process until the first pixels
        self._load: dict[Stage, float] = defaultdict(float)
        self._run: dict[Stage, float] = defaultdict(float)
        self._steps: dict[Stage, list[float]] = defaultdict(list)

    def loaded(self, stage: Stage, seconds: float) -> None:
        self._load[stage] += seconds

    @contextmanager
    def running(self, stage: Stage) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._run[stage] += time.perf_counter() - began

    @contextmanager
    def step(self, stage: Stage) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._steps[stage].append(time.perf_counter() - began)

    def image(self) -> None:
        """Note that an image is there."""
        if self.first_image is None:
            self.first_image = since_start()

    def to_json(self) -> dict[str, Any]:
        """Seconds, ready for json.dumps. "step" is the median of all steps but the first, "steps" their sum. "run" is
        what else a stage computed: all of one without steps, conditions and the sampler of one with steps."""
        later = {stage: steps[1:] for stage, steps in self._steps.items() if len(steps) > 1}
        found: dict[str, Any] = {
            "open": self.opened,
            "load": dict(self._load),
            "first_step": {stage: steps[0] for stage, steps in self._steps.items()},
            "step": {stage: median(steps) for stage, steps in later.items()},
            "steps": {stage: sum(steps) for stage, steps in later.items()},
            "run": self._rest(),
            "first_image": self.first_image,
        }
        return {name: _rounded(value) for name, value in found.items()}

    def line(self) -> str:
        """The phases in one line."""
        phases = {"open": self.opened or 0.0, "load": sum(self._load.values())}
        phases |= {f"first step of the {stage}": steps[0] for stage, steps in self._steps.items()}
        phases["other steps"] = sum(sum(steps[1:]) for steps in self._steps.values())
        phases["the rest of the stages"] = sum(self._rest().values())
        total = "" if self.first_image is None else f"first image after {self.first_image:.2f} s: "
        return total + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in phases.items())

    def _rest(self) -> dict[Stage, float]:
        """Seconds that each stage computed beside its steps."""
        return {stage: seconds - sum(self._steps.get(stage, ())) for stage, seconds in self._run.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _rounded(each) for name, each in value.items()}
    return None if value is None else round(value, 4)
