"""The results of the phases in a JSON file, written after each, so that a later run goes on where one ended."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...schemas.errors import UsageError
from ...storage.atomic_file import whole_file
from .job import GpuJob

FORMAT = "cascadekit-gpu-bench"
VERSION = 1


@dataclass
class BenchState:
    """The results by phase. A result has "seconds", and "result" or "error"."""

    path: Path
    job: GpuJob
    machine: dict[str, Any]
    phases: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, job: GpuJob, machine: dict[str, Any]) -> "BenchState":
        """The state in `path`, or a new one.

        Raises UsageError for another file, and for results of other settings or another GPU."""
        state = cls(path, job, machine)
        if not path.exists():
            return state
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            written, phases, gpu = found["job"], found["phases"], found["machine"].get("gpu")
            known = (found["format"], found["version"]) == (FORMAT, VERSION)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path}: is no state of this benchmark; give another file as state") from error
        if not known:
            raise UsageError(f"{path}: {found['format']} {found['version']}, expected {FORMAT} {VERSION}")
        if written != json.loads(json.dumps(asdict(job))):
            raise UsageError(f"{path}: has results of other settings: {written}; give another file as state")
        if gpu != machine.get("gpu"):
            here = machine.get("gpu")
            raise UsageError(f"{path}: has results of another GPU ({gpu}; here: {here}); give another file as state")
        state.phases = phases
        return state

    def done(self, name: str) -> bool:
        return "result" in self.phases.get(name, {})

    def failed(self, name: str) -> bool:
        return "error" in self.phases.get(name, {})

    def keep(self, name: str, **result: Any) -> None:
        self.phases[name] = result
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self.path) as file:
            file.write((json.dumps(self.to_json(), indent=2) + "\n").encode())

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "machine": self.machine,
            "job": asdict(self.job),
            "phases": self.phases,
        }
