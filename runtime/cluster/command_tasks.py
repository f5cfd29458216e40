"""Runs many commands of cascadekit on a Ray cluster, each as a task with a hint of the memory that it takes.

Each command runs in a process of its own, so a crash or a lack of memory ends one command. Its output appears whole or
not at all, as always.
"""

import hashlib
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

from ...schemas.errors import UsageError
from ...schemas.messages import listed_below, reason
from ..batch.batch_log import BatchLog, read_log
from ..batch.prompt_files import COMMENT, text_lines

Ending = Literal["done", "failed", "skipped"]

SHOWN = 20  # problems that a message lists
FAILED_LINES = 3  # of standard error that are kept of a failed command
MIB = 1 << 20


# The memory of a command: bytes, and a share of the bytes of the files that it names. Measured peaks are in
# docs/memory.md (convert and export) and in converters/tensorrt/estimate.py (build).
HINTS: Mapping[str, tuple[int, float]] = {
    "convert": (256 * MIB, 0),
    "export": (256 * MIB, 0),
    "build": (512 * MIB, 1.33),
}


@dataclass(frozen=True)
class CommandTask:
    """One command: its line in the file, from 1, its words, and the bytes of memory that Ray keeps free for it."""

    line: int
    words: tuple[str, ...]
    memory: int

    @property
    def key(self) -> str:
        """The key by which the log knows the command."""
        return hashlib.sha256(os.fsencode("\0".join(self.words))).hexdigest()


@dataclass(frozen=True)
class CommandOutcome:
    """How a command ended: the node, the seconds and, if it failed, the end of its standard error."""

    task: CommandTask
    kind: Ending
    node: str = ""
    seconds: float = 0.0
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        fields = {"line": self.task.line, "key": self.task.key, "command": shlex.join(self.task.words)}
        told = {"node": self.node, "seconds": round(self.seconds, 3), "error": self.error}
        return fields | {name: value for name, value in told.items() if value}


def read_commands(path: Path) -> list[CommandTask]:
    """The commands of a file, one a line as on a command line, with or without "cascadekit" before it.

    Raises UsageError for a file that cannot be read, and for all lines that are no convert, export or build."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{path}: the commands cannot be read: {reason(error)}; give a text file, a command a line"
        ) from error
    tasks, problems = [], []
    for number, line in text_lines(content):
        if line.startswith(COMMENT):
            continue
        try:
            tasks.append(_task(number, shlex.split(line)))
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
    if problems:
        raise UsageError(f"wrong lines in the file of commands: {len(problems)}{listed_below(problems, SHOWN)}")
    if not tasks:
        raise UsageError(f"{path}: holds no commands; write one a line, as in: convert SRC -o OUT --to diffusers")
    return tasks


def _task(number: int, words: Sequence[str]) -> CommandTask:
    """Raises ValueError for another command."""
    words = words[1:] if words[:1] == ["cascadekit"] else words
    if not words or words[0] not in HINTS:
        raise ValueError(f"expected {', '.join(HINTS)}, found {words[0] if words else 'nothing'}")
    base, share = HINTS[words[0]]
    nbytes = sum(_bytes(Path(word)) for word in words[1:]) if share else 0
    return CommandTask(number, tuple(words), base + int(nbytes * share))


def _bytes(path: Path) -> int:
    """The bytes of a file, or of the files in a folder; 0 where there is none."""
    try:
        files = [path] if path.is_file() else path.rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file())
    except OSError:
        return 0


def run_command(task: CommandTask) -> CommandOutcome:
    """Run the command in a process of its own, on the machine of the caller."""
    began = perf_counter()
    process = [sys.executable, "-m", "cascadekit", *task.words]
    ended = subprocess.run(process, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    lines = [line for line in ended.stderr.splitlines() if line.strip()][-FAILED_LINES:]
    error = " ".join(lines) or f"exit code {ended.returncode}" if ended.returncode else None
    kind: Ending = "failed" if ended.returncode else "done"
    return CommandOutcome(task, kind, socket.gethostname(), perf_counter() - began, error)


def run_commands(
    ray: Any, tasks: Sequence[CommandTask], log: BatchLog, check: Callable[[], object] = lambda: None
) -> Iterator[CommandOutcome]:
    """Run the commands on the cluster of `ray`, and yield each outcome once it is in the log.

    Commands that the log has as done are skipped. A command that fails does not stop the others; one whose node is
    lost is run again. `check` may raise an exception to stop."""
    done = {event.get("key") for event in read_log(log.path) if event.get("event") == "done"}
    for task in tasks:
        if task.key in done:
            yield _logged(log, CommandOutcome(task, "skipped"))
    largest = max((node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]), default=0)
    remote = ray.remote(run_command)
    waiting = {}
    for task in tasks:
        if task.key in done:
            continue
        if task.memory > largest:
            need = f"{task.memory / 1e9:.1f} GB, and no node has more than {largest / 1e9:.1f} GB"
            yield _logged(log, CommandOutcome(task, "failed", error=f"the command needs about {need}"))
            continue
        waiting[remote.options(memory=task.memory, num_cpus=1, max_retries=3).remote(task)] = task
    while waiting:
        (ready, *_), _rest = ray.wait(list(waiting), num_returns=1)
        task = waiting.pop(ready)
        try:
            outcome = ray.get(ready)
        except ray.exceptions.RayError as error:
            said = next(iter(str(error).strip().splitlines()), type(error).__name__)
            outcome = CommandOutcome(task, "failed", error=f"Ray gave up: {said}")
        yield _logged(log, outcome)
        check()


def _logged(log: BatchLog, outcome: CommandOutcome) -> CommandOutcome:
    log.write(outcome.kind, outcome.to_json())
    return outcome
