"""Draws the jobs of a batch, each once whatever happens in between, and tells a log.

What is finished is told by the images themselves: the one at a job's path has the job's key in its metadata. The log
is for people and programs; only the seed of a batch that was given none is taken from it.
"""

import fcntl
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from ...schemas.errors import CascadeError, CheckpointError, UsageError
from ...schemas.request import Request
from ...schemas.settings import Settings
from ...schemas.stages import Stage
from ...storage.atomic_file import remove_leftovers as remove_files
from ..cascade import Cascade
from ..images.png import read_settings, save_png
from ..sampling.ddpm import Step
from ..text.text_cache import ROWS
from .jobs import KEY, Found, Job, look
from .log import Journal, read_journal
from .requests import Drawn, draw, groups, text_length

MOST_PIXELS = 4 << 20  # of all images drawn together, unless a number is given
PROMPTS_AT_ONCE = 8  # and their negatives, encoded before anything can stop the run again
TOKENS = 75  # of a chunk, besides its start and end

OnStep = Callable[[Sequence[Job], Stage, Step], object]
Kind = Literal["drawn", "copied", "skipped", "failed"]


@dataclass(frozen=True)
class Outcome:
    """What became of a job. `seconds` by stage are of all `together` images that were drawn at once; `of` is the
    job whose image was copied."""

    job: Job
    kind: Kind
    seconds: Mapping[str, float] = field(default_factory=dict)
    together: int = 1
    of: Job | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        job = self.job
        said = {"number": job.number, "line": job.line, "key": job.key, "path": str(job.path), "seed": job.request.seed}
        more = {"of": self.of and self.of.number, "error": self.error}
        timed = {"seconds": self.seconds, "together": self.together} if self.seconds else {}
        return said | {name: value for name, value in more.items() if value is not None} | timed


@dataclass
class Clock:
    """Seconds by what they went to."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _last: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        """What passed since the last call went to `name`."""
        now = time.perf_counter()
        self.seconds[name] += now - self._last
        self._last = now

    def told(self) -> dict[str, float]:
        return {name: round(value, 3) for name, value in self.seconds.items()}


@dataclass(frozen=True)
class Runner:
    """Draws jobs. `on_step` is told of every step, with the jobs that are drawn, `check` is called wherever nothing
    would be lost; both may raise to stop the run, but not what an image may fail with: CascadeError, OSError and
    MemoryError. `together` images are drawn at once, as many as MOST_PIXELS have room for when it is None. `force`
    draws what is finished again."""

    cascade: Cascade
    journal: Journal
    together: int | None = None
    force: bool = False
    on_step: OnStep = lambda jobs, stage, step: None
    check: Callable[[], object] = lambda: None

    def run(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        """What becomes of each job, once it is on disk and in the log.

        A job that cannot be drawn fails alone. Raises CascadeError when an image or the log cannot be written, or the
        bundle is damaged; run again, with the same jobs, it goes on."""
        remove_leftovers(jobs)
        done = [] if self.force else [job for job in jobs if look(job) is Found.DONE]
        yield from self._told("skipped", [Outcome(job, "skipped") for job in done])
        finished = {job.number for job in done}
        left: dict[str, list[Job]] = defaultdict(list)  # by key: one is drawn, the others are copies of it
        for job in jobs:
            if job.number not in finished:
                left[job.key].append(job)
        for source in done:
            if source.key in left and (found := _opened(source)):
                yield from self._copies(source, left.pop(source.key), *found)
        for window in windows(job for job, *_ in left.values()):
            yield from self._window(window, left)

    def _window(self, jobs: Sequence[Job], left: Mapping[str, Sequence[Job]]) -> Iterator[Outcome]:
        """Jobs whose prompts fit the text encoder's cache: encoded first, so that it is loaded once for all."""
        order = {group: place for place, group in reversed(list(enumerate(job.request.group for job in jobs)))}
        clock = Clock()
        self._encode(jobs)
        ordered = sorted(jobs, key=lambda job: (order[job.request.group], self._tokens(job.request)))
        clock.lap(Stage.TEXT_ENCODER)
        for group in self._groups(ordered):
            self.check()
            for members, drawn in self._drawn(group, clock):
                yield from self._finished(members, drawn, left, clock)
            clock = Clock()

    def _encode(self, jobs: Sequence[Job]) -> None:
        def how(job: Job) -> tuple[bool, bool]:
            return job.request.settings.weighted, job.request.settings.long_prompts

        for (weighted, long), alike in groupby(sorted(jobs, key=how), key=how):
            members = list(alike)
            for start in range(0, len(members), PROMPTS_AT_ONCE):
                self.check()
                requests = [job.request for job in members[start : start + PROMPTS_AT_ONCE]]
                prompts, negatives = [each.prompt for each in requests], [each.negative for each in requests]
                with suppress(UsageError):  # told with the image it belongs to
                    self.cascade.encode_prompt(prompts, negatives, weighted=weighted, long_prompts=long)

    def _groups(self, jobs: Sequence[Job]) -> Iterator[list[Job]]:
        for _, alike in groupby(jobs, key=lambda job: (job.request.group, self._tokens(job.request))):
            members = list(alike)
            left = iter(members)
            most = self.together or images_together(members[0].request.settings)
            for group in groups([job.request for job in members], most):
                yield [next(left) for _ in group]

    def _tokens(self, request: Request) -> int:
        with suppress(UsageError):  # told when it is drawn
            return text_length(self.cascade, request)
        return 0

    def _drawn(self, group: Sequence[Job], clock: Clock) -> Iterator[tuple[Sequence[Job], Sequence[Drawn] | Exception]]:
        """The images of a group; where it fails as a whole, of each of its jobs alone, and errors for some."""

        def on_step(stage: Stage, step: Step) -> None:
            clock.lap(stage)
            self.on_step(group, stage, step)

        try:
            drawn = draw(self.cascade, [job.request for job in group], Path(), on_step)
        except CheckpointError:
            raise
        except (CascadeError, OSError, MemoryError) as error:
            if len(group) == 1:
                yield group, error
                return
        else:
            clock.lap(Stage.VQGAN)
            yield group, drawn
            return
        for job in group:
            self.check()
            yield from self._drawn([job], clock)

    def _finished(
        self,
        group: Sequence[Job],
        drawn: Sequence[Drawn] | Exception,
        left: Mapping[str, Sequence[Job]],
        clock: Clock,
    ) -> Iterator[Outcome]:
        """Save what was drawn, and again for jobs that are the same; all of it, before anything may stop the run."""
        if isinstance(drawn, Exception):
            text = one_line(drawn)
            yield from self._told("failed", [Outcome(job, "failed", error=text) for job in left[group[0].key]])
            return
        outcomes: list[Outcome] = []
        try:
            for job, one in zip(group, drawn, strict=True):
                metadata = {**one.metadata, KEY: job.key}
                self._save(job, one.image, metadata)
                outcomes += self._told("done", [Outcome(job, "drawn", clock.told(), len(group))])
                outcomes += self._copies(job, left[job.key][1:], one.image, metadata)
        except CascadeError:
            yield from outcomes
            raise
        yield from outcomes

    def _copies(
        self, source: Job, jobs: Sequence[Job], picture: Image.Image, metadata: Mapping[str, Any]
    ) -> Iterator[Outcome]:
        for job in jobs:
            self._save(job, picture, metadata)
            yield from self._told("copied", [Outcome(job, "copied", of=source)])

    def _save(self, job: Job, picture: Image.Image, metadata: Mapping[str, Any]) -> None:
        try:
            found = look(job)
            if found is Found.OTHER and not self.force:
                raise UsageError(f"{job.path}: another image was put there meanwhile; move it away")
            save_png(job.path, picture, metadata, force=self.force or found is not Found.NOTHING)
        except UsageError as error:
            failed = Outcome(job, "failed", error=str(error))
            with suppress(CascadeError):  # the log is perhaps on the same disk
                self.journal.write("failed", failed.to_json())
            raise CascadeError(f"stopped: {error}, or make room and run the same again to go on") from error

    def _told(self, event: str, outcomes: list[Outcome]) -> list[Outcome]:
        if outcomes:
            self.journal.write(event, *(outcome.to_json() for outcome in outcomes))
        return outcomes


def images_together(settings: Settings) -> int:
    """How many images of one size are drawn at once when no number is given."""
    return max(1, MOST_PIXELS // (settings.width * settings.height))


def windows(jobs: Iterable[Job], rows: int = ROWS - 1) -> Iterator[list[Job]]:
    """Jobs in a row whose prompts make at most `rows` rows of tokens, but at least one job. The encoder's cache has
    one row more, for the empty prompt."""
    window: list[Job] = []
    texts: dict[tuple[str, bool], int] = {}
    for job in jobs:
        settings = job.request.settings
        new = {
            (text, settings.weighted): 1 + len(text.encode()) // TOKENS if settings.long_prompts else 1
            for text in (job.request.prompt, job.request.negative)
        }
        if window and sum((texts | new).values()) > rows:
            yield window
            window, texts = [], {}
        window.append(job)
        texts |= new
    if window:
        yield window


def last_seed(log: Path) -> int | None:
    """The base seed of the batch that was last begun with this log."""
    seeds = [event.get("base_seed") for event in read_journal(log) if event.get("event") == "started"]
    return next((seed for seed in reversed(seeds) if isinstance(seed, int)), None)


def conflicts(jobs: Iterable[Job]) -> list[str]:
    """What lies where images are to go and is none of theirs."""
    return [f"{job.path}: not the image of line {job.line}" for job in jobs if look(job) is Found.OTHER]


def remove_leftovers(jobs: Sequence[Job]) -> None:
    """Delete what a killed run had begun to write beside the jobs' images."""
    names: dict[Path, set[str]] = defaultdict(set)
    for job in jobs:
        names[job.path.parent].add(job.path.name)
    for folder, here in names.items():
        remove_files(folder, here.__contains__)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold `folder`, making it, so that no other batch draws into it. The lock goes with the process.

    Raises UsageError when another one does, or it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UsageError(f"{folder}: expected a folder to write to: {error.strerror}; choose another -o") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UsageError(f"{folder}: another batch is drawn into it; wait for that one or choose another -o") from error
    else:
        yield
    finally:
        os.close(descriptor)


def _opened(job: Job) -> tuple[Image.Image, Mapping[str, Any]] | None:
    """The job's finished image and its metadata; None when its pixels turn out to be damaged."""
    try:
        with Image.open(job.path) as picture:
            picture.load()
        return picture, read_settings(job.path) or {}
    except (OSError, ValueError, SyntaxError):
        return None


def one_line(error: Exception) -> str:
    """An error as a line of a log."""
    return " ".join(str(error).split()) or type(error).__name__
