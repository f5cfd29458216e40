"""Sends inputs to the worker, starts it again when one of them ended it, and says what is wrong with which."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

KINDS = (
    "safetensors", "config", "index", "manifest", "graph", "tokenizer", "lora", "pickle", "gguf", "quantised", "png",
    "prompts", "options",
)  # fmt: skip
SECONDS = 30.0  # for one input; they take milliseconds, and a machine may be busy
SPARE = 60.0  # after which a worker that did not end itself is ended
FINE = ("done", "refused")


@dataclass(frozen=True)
class Finding:
    """An input that was neither taken nor refused in words."""

    kind: str
    seed: int
    what: str  # traceback, hang, abort or memory
    error: str
    where: str

    def __str__(self) -> str:
        return (
            f"{self.kind} {self.seed}: {self.what}: {self.error}\n    at {self.where}\n"
            f"    again: python -m tests.fuzz {self.kind} {self.seed}"
        )


class Fuzzer:
    """A worker on the tiny cascade in `root`, for as long as its context lasts; its answers are counted.

    A worker for `planted` faults alone starts sooner."""

    def __init__(self, root: Path, seconds: float = SECONDS, *, planted: bool = False) -> None:
        self._root, self._seconds = root, seconds
        self._kinds = "planted" if planted else "all"
        self._process: subprocess.Popen[str] | None = None
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed where the context ends
        self.counts: dict[str, int] = {}
        self.peak = 0  # bytes that an input took

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()
        self._log.close()

    def findings(self, kind: str, seeds: range) -> Iterator[Finding]:
        for seed in seeds:
            answer = self.run(kind, seed)
            self.counts[answer["what"]] = self.counts.get(answer["what"], 0) + 1
            self.peak = max(self.peak, answer.get("grown", 0))
            if answer["what"] not in FINE:
                yield Finding(kind, seed, answer["what"], answer["error"], answer["where"])

    def run(self, kind: str, seed: int) -> dict[str, Any]:
        """The result of one input."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{kind} {seed}\n")
        process.stdin.flush()
        # The worker ends itself when time is up; this is for one that cannot even do that.
        clock = threading.Timer(2 * self._seconds + SPARE, process.kill)
        clock.start()
        line = process.stdout.readline()
        clock.cancel()
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        return {"kind": kind, "seed": seed, **self._death(process)}

    def _running(self) -> "subprocess.Popen[str]":
        if self._process is None:
            tests = Path(__file__).resolve().parents[1]
            paths = [str(tests), *filter(None, [os.environ.get("PYTHONPATH")])]
            self._log.truncate(0)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fuzz.worker", str(self._root.resolve()), str(self._seconds), self._kinds],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            )
            assert self._process.stdout is not None
            if self._process.stdout.readline() != "ready\n":
                self._process.wait()
                self._log.seek(0)
                raise RuntimeError(f"the worker did not start: {self._log.read()[-3000:]}")
        return self._process

    def _death(self, process: "subprocess.Popen[str]") -> dict[str, str]:
        """How the worker ended, and where it was."""
        code = process.wait()
        self._process = None
        self._log.seek(0)
        said = self._log.read()
        frames = [line.strip() for line in said.splitlines() if line.strip().startswith("File ")]
        where = " < ".join(frames[:6])
        if "Timeout (" in said:
            return {"what": "hang", "error": f"no answer after {self._seconds:g} seconds", "where": where}
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return {"what": "abort", "error": f"the process ended: {how}; {said[-300:]!r}", "where": where}

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
