"""Keeps the images of a batch's jobs, each once, however often the run is interrupted, and a log.

A finished image has its job's key in its metadata, which shows that the job is done. The log is for people and
programs. A batch without a seed reads the seed of an earlier run from the log, and nothing else.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from ...schemas.errors import CascadeError, UsageError
from ...storage.atomic_file import remove_leftovers as remove_files
from ...storage.bucket import BucketPath
from ...storage.locks import locked
from ..images.png import save_bytes
from .batch_log import BatchLog, read_log
from .image_jobs import ImageJob, OutputState, output_state, output_states

OutcomeKind = Literal["generated", "copied", "skipped", "failed"]


@dataclass(frozen=True)
class Outcome:
    """How a job ended. `seconds` by stage cover all `together` images that were computed at once.

    `source` is the job whose image was copied."""

    job: ImageJob
    kind: OutcomeKind
    seconds: Mapping[str, float] = field(default_factory=dict)
    together: int = 1
    source: ImageJob | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        job = self.job
        fields = {
            "number": job.number,
            "line": job.line,
            "key": job.key,
            "path": str(job.path),
            "seed": job.request.seed,
            "of": self.source and self.source.number,
            "error": self.error,
        }
        timed = {"seconds": self.seconds, "together": self.together} if self.seconds else {}
        return {name: value for name, value in fields.items() if value is not None} | timed


@dataclass(frozen=True)
class GeneratedGroup:
    """The jobs whose images were computed together, and the bytes of their PNG files or the message of their error.

    `seconds` are those of each stage."""

    jobs: Sequence[ImageJob]
    files: Sequence[bytes] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None


GenerateGroups = Callable[[Sequence[ImageJob]], Iterator[GeneratedGroup]]  # each job is in one of the groups


@dataclass(frozen=True)
class BatchRunner:
    """Takes the images of jobs from `generate`, each once, and keeps them. `force` generates finished images again.

    `generate` may raise an exception to stop the run, other than OSError and MemoryError."""

    generate: GenerateGroups
    log: BatchLog
    force: bool = False

    def run(self, jobs: Sequence[ImageJob], states: Sequence[OutputState] | None = None) -> Iterator[Outcome]:
        """Yield the outcome of each job once it is on disk and in the log.

        `states` are those of the jobs' files; None reads them, unless finished images are generated again.
        A job that fails does not stop the others. Raises CascadeError when an image or the log cannot be written, or
        the bundle is damaged. A later run of the same jobs continues with the unfinished ones."""
        remove_leftovers(jobs)
        done = (
            [] if self.force else _with_state(jobs, output_states(jobs) if states is None else states, OutputState.DONE)
        )
        yield from self._logged("skipped", [Outcome(job, "skipped") for job in done])
        finished = {job.number for job in done}
        left: dict[str, list[ImageJob]] = defaultdict(list)  # by key; the first is generated, the others copy it
        for job in jobs:
            if job.number not in finished:
                left[job.key].append(job)
        for source in done:
            if source.key in left and (content := _content(source)):
                yield from self._copies(source, left.pop(source.key), content)
        if left:
            for group in self.generate([job for job, *_ in left.values()]):
                yield from self._finished(group, left)

    def _finished(self, group: GeneratedGroup, left: Mapping[str, Sequence[ImageJob]]) -> Iterator[Outcome]:
        """Save the images and their copies for jobs of the same key, all before the run may be stopped."""
        if group.error is not None:
            failed = [Outcome(job, "failed", error=group.error) for first in group.jobs for job in left[first.key]]
            yield from self._logged("failed", failed)
            return
        outcomes: list[Outcome] = []
        try:
            for job, content in zip(group.jobs, group.files, strict=True):
                self._save(job, content)
                outcomes += self._logged("done", [Outcome(job, "generated", group.seconds, len(group.jobs))])
                outcomes += self._copies(job, left[job.key][1:], content)
        except CascadeError:
            yield from outcomes
            raise
        yield from outcomes

    def _copies(self, source: ImageJob, jobs: Sequence[ImageJob], content: bytes) -> Iterator[Outcome]:
        for job in jobs:
            self._save(job, content)
            yield from self._logged("copied", [Outcome(job, "copied", source=source)])

    def _save(self, job: ImageJob, content: bytes) -> None:
        try:
            found = output_state(job)
            if found is OutputState.OTHER and not self.force:
                raise UsageError(f"{job.path}: another process has written an image there; move it away")
            if isinstance(job.path, BucketPath):
                job.path.put(content)
            else:
                save_bytes(job.path, content, force=self.force or found is not OutputState.NOTHING)
        except CascadeError as error:
            failed = Outcome(job, "failed", error=str(error))
            with suppress(CascadeError):  # the log may be on the same full disk
                self.log.write("failed", failed.to_json())
            raise CascadeError(f"stopped: {error}, or make room, and run the same command again to continue") from error

    def _logged(self, event: str, outcomes: list[Outcome]) -> list[Outcome]:
        if outcomes:
            self.log.write(event, *(outcome.to_json() for outcome in outcomes))
        return outcomes


def last_seed(log: Path) -> int | None:
    """The base seed of the last batch in the log; None without one."""
    seeds = [event.get("base_seed") for event in read_log(log) if event.get("event") == "started"]
    return next((seed for seed in reversed(seeds) if isinstance(seed, int)), None)


def foreign_files(jobs: Sequence[ImageJob], states: Sequence[OutputState]) -> list[str]:
    """A message for each file at the path of an image that is not the image of its job."""
    return [f"{job.path}: not the image of line {job.line}" for job in _with_state(jobs, states, OutputState.OTHER)]


def _with_state(jobs: Sequence[ImageJob], states: Sequence[OutputState], wanted: OutputState) -> list[ImageJob]:
    return [job for job, found in zip(jobs, states, strict=True) if found is wanted]


def remove_leftovers(jobs: Sequence[ImageJob]) -> None:
    """Delete the unfinished files that killed runs left beside the jobs' images."""
    names: dict[Path, set[str]] = defaultdict(set)
    for job in jobs:
        names[job.path.parent].add(job.path.name)
    for folder, here in names.items():
        remove_files(folder, here.__contains__)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Make `folder` and lock it, so that no other batch writes into it. The lock ends with the process. A bucket has
    neither folders nor locks.

    Raises UsageError when another batch has the lock, or the folder cannot be made."""
    if isinstance(folder, BucketPath):
        yield
        return
    real = Path(os.path.realpath(folder))
    with ExitStack() as held:
        try:
            held.enter_context(locked(real, lambda: real.mkdir(parents=True, exist_ok=True)))
        except BlockingIOError as error:
            raise UsageError(
                f"{folder}: another batch writes into it; wait for that batch, or choose another output"
            ) from error
        except OSError as error:
            raise UsageError(
                f"{folder}: expected a folder to write to: {error.strerror}; choose another output"
            ) from error
        yield


def _content(job: ImageJob) -> bytes | None:
    """The bytes of the job's finished image; None when its pixels turn out to be damaged."""
    try:
        content = job.path.read_bytes()
        with Image.open(BytesIO(content)) as picture:
            picture.load()
        return content
    except (OSError, ValueError, SyntaxError):
        return None
