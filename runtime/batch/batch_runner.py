"""Generates the images of a batch's jobs, each once, however often the run is interrupted, and keeps a log.

A finished image has its job's key in its metadata, which shows that the job is done. The log is for people and
programs. A batch without a seed reads the seed of an earlier run from the log, and nothing else.
"""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from ...schemas.errors import CascadeError, CheckpointError, UsageError
from ...schemas.request import Request
from ...schemas.stages import Stage
from ...storage.atomic_file import remove_leftovers as remove_files
from ...storage.locks import locked
from ..cascade import Cascade
from ..images.png import Sign, read_settings, save_png
from ..sampling.loop import Step
from ..text.prompts import CACHED_ROWS
from .batch_log import BatchLog, read_log
from .generate_requests import GeneratedImage, generate_requests, request_groups, text_length
from .image_jobs import KEY, ImageJob, OutputState, output_state

PROMPTS_AT_ONCE = 8  # encoded with their negatives between two calls of `check`
TOKENS = 75  # of a chunk, without its start and end tokens

OnStep = Callable[[Sequence[ImageJob], Stage, Step], object]
Kind = Literal["generated", "copied", "skipped", "failed"]


@dataclass(frozen=True)
class Outcome:
    """How a job ended. `seconds` by stage cover all `together` images that were computed at once. `of` is the job whose
    image was copied."""

    job: ImageJob
    kind: Kind
    seconds: Mapping[str, float] = field(default_factory=dict)
    together: int = 1
    of: ImageJob | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        job = self.job
        fields = {
            "number": job.number,
            "line": job.line,
            "key": job.key,
            "path": str(job.path),
            "seed": job.request.seed,
            "of": self.of and self.of.number,
            "error": self.error,
        }
        timed = {"seconds": self.seconds, "together": self.together} if self.seconds else {}
        return {name: value for name, value in fields.items() if value is not None} | timed


@dataclass
class Stopwatch:
    """Seconds by the name of what took them."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _last: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        """Add the time since the last call to `name`."""
        now = time.perf_counter()
        self.seconds[name] += now - self._last
        self._last = now

    def rounded(self) -> dict[str, float]:
        return {name: round(value, 3) for name, value in self.seconds.items()}


@dataclass(frozen=True)
class BatchRunner:
    """Generates the images of jobs.

    `together` images are computed at once (None: see `images_together`). `force` generates finished images
    again. `sign` signs each file, see `images.provenance`. `on_step` is called after every step, with the jobs whose
    images are being generated. `check` is called wherever the run can stop without loss. Both may raise an exception
    to stop the run, other than CascadeError, OSError and MemoryError, which mean that an image failed."""

    cascade: Cascade
    log: BatchLog
    together: int | None = None
    force: bool = False
    sign: Sign | None = None
    on_step: OnStep = lambda jobs, stage, step: None
    check: Callable[[], object] = lambda: None

    def run(self, jobs: Sequence[ImageJob]) -> Iterator[Outcome]:
        """Yield the outcome of each job once it is on disk and in the log.

        A job that fails does not stop the others. Raises CascadeError when an image or the log cannot be written, or
        the bundle is damaged. A later run of the same jobs continues with the unfinished ones."""
        remove_leftovers(jobs)
        done = [] if self.force else [job for job in jobs if output_state(job) is OutputState.DONE]
        yield from self._logged("skipped", [Outcome(job, "skipped") for job in done])
        finished = {job.number for job in done}
        left: dict[str, list[ImageJob]] = defaultdict(list)  # by key; the first is generated, the others copy it
        for job in jobs:
            if job.number not in finished:
                left[job.key].append(job)
        for source in done:
            if source.key in left and (found := _opened(source)):
                yield from self._copies(source, left.pop(source.key), *found)
        for window in windows(job for job, *_ in left.values()):
            yield from self._window(window, left)

    def _window(self, jobs: Sequence[ImageJob], left: Mapping[str, Sequence[ImageJob]]) -> Iterator[Outcome]:
        """Generate jobs whose prompts fit the text cache. All are encoded first: the text encoder is loaded once."""
        order = {group: place for place, group in reversed(list(enumerate(job.request.group for job in jobs)))}
        clock = Stopwatch()
        self._encode(jobs)
        ordered = sorted(jobs, key=lambda job: (order[job.request.group], self._tokens(job.request)))
        clock.lap(Stage.TEXT_ENCODER)
        for group in self._groups(ordered):
            self.check()
            for members, images in self._generated(group, clock):
                yield from self._finished(members, images, left, clock)
            clock = Stopwatch()

    def _encode(self, jobs: Sequence[ImageJob]) -> None:
        def how(job: ImageJob) -> tuple[bool, bool]:
            return job.request.settings.weighted, job.request.settings.long_prompts

        for (weighted, long), alike in groupby(sorted(jobs, key=how), key=how):
            members = list(alike)
            for start in range(0, len(members), PROMPTS_AT_ONCE):
                self.check()
                requests = [job.request for job in members[start : start + PROMPTS_AT_ONCE]]
                prompts, negatives = [each.prompt for each in requests], [each.negative for each in requests]
                with suppress(UsageError):  # reported with the image
                    self.cascade.encode_prompt(prompts, negatives, weighted=weighted, long_prompts=long)

    def _groups(self, jobs: Sequence[ImageJob]) -> Iterator[list[ImageJob]]:
        left = iter(jobs)
        for group in request_groups([job.request for job in jobs], self.together, self._tokens):
            yield [next(left) for _ in group]

    def _tokens(self, request: Request) -> int:
        with suppress(UsageError):  # reported when the image is generated
            return text_length(self.cascade, request)
        return 0

    def _generated(
        self, group: Sequence[ImageJob], clock: Stopwatch
    ) -> Iterator[tuple[Sequence[ImageJob], Sequence[GeneratedImage] | Exception]]:
        """Yield the images of a group. If the group fails, yield the images or the error of each of its jobs alone."""

        def on_step(stage: Stage, step: Step) -> None:
            clock.lap(stage)
            self.on_step(group, stage, step)

        try:
            images = generate_requests(self.cascade, [job.request for job in group], on_step)
        except CheckpointError:
            raise
        except (CascadeError, OSError, MemoryError) as error:
            if len(group) == 1:
                yield group, error
                return
        else:
            clock.lap(Stage.VQGAN)
            yield group, images
            return
        for job in group:
            self.check()
            yield from self._generated([job], clock)

    def _finished(
        self,
        group: Sequence[ImageJob],
        images: Sequence[GeneratedImage] | Exception,
        left: Mapping[str, Sequence[ImageJob]],
        clock: Stopwatch,
    ) -> Iterator[Outcome]:
        """Save the images and their copies for jobs of the same key, all before `check` may stop the run."""
        if isinstance(images, Exception):
            text = " ".join(str(images).split()) or type(images).__name__
            yield from self._logged("failed", [Outcome(job, "failed", error=text) for job in left[group[0].key]])
            return
        outcomes: list[Outcome] = []
        try:
            for job, one in zip(group, images, strict=True):
                metadata = {**one.metadata, KEY: job.key}
                self._save(job, one.image, metadata)
                outcomes += self._logged("done", [Outcome(job, "generated", clock.rounded(), len(group))])
                outcomes += self._copies(job, left[job.key][1:], one.image, metadata)
        except CascadeError:
            yield from outcomes
            raise
        yield from outcomes

    def _copies(
        self, source: ImageJob, jobs: Sequence[ImageJob], picture: Image.Image, metadata: Mapping[str, Any]
    ) -> Iterator[Outcome]:
        for job in jobs:
            self._save(job, picture, metadata)
            yield from self._logged("copied", [Outcome(job, "copied", of=source)])

    def _save(self, job: ImageJob, picture: Image.Image, metadata: Mapping[str, Any]) -> None:
        try:
            found = output_state(job)
            if found is OutputState.OTHER and not self.force:
                raise UsageError(f"{job.path}: another process has written an image there; move it away")
            replaces = self.force or found is not OutputState.NOTHING
            save_png(job.path, picture, metadata, force=replaces, sign=self.sign)
        except UsageError as error:
            failed = Outcome(job, "failed", error=str(error))
            with suppress(CascadeError):  # the log is perhaps on the same disk
                self.log.write("failed", failed.to_json())
            raise CascadeError(f"stopped: {error}, or make room, and run the same command again to continue") from error

    def _logged(self, event: str, outcomes: list[Outcome]) -> list[Outcome]:
        if outcomes:
            self.log.write(event, *(outcome.to_json() for outcome in outcomes))
        return outcomes


def windows(jobs: Iterable[ImageJob], rows: int = CACHED_ROWS - 1) -> Iterator[list[ImageJob]]:
    """Yield successive jobs whose prompts have at most `rows` rows of tokens together, at least one job at a time.

    The text cache has one row more, for the empty prompt."""
    window: list[ImageJob] = []
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
    """The base seed of the last batch in the log; None without one."""
    seeds = [event.get("base_seed") for event in read_log(log) if event.get("event") == "started"]
    return next((seed for seed in reversed(seeds) if isinstance(seed, int)), None)


def foreign_files(jobs: Iterable[ImageJob]) -> list[str]:
    """A message for each file at the path of an image that is not the image of its job."""
    return [f"{job.path}: not the image of line {job.line}" for job in jobs if output_state(job) is OutputState.OTHER]


def remove_leftovers(jobs: Sequence[ImageJob]) -> None:
    """Delete the unfinished files that killed runs left beside the jobs' images."""
    names: dict[Path, set[str]] = defaultdict(set)
    for job in jobs:
        names[job.path.parent].add(job.path.name)
    for folder, here in names.items():
        remove_files(folder, here.__contains__)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Make `folder` and lock it, so that no other batch writes into it. The lock ends with the process.

    Raises UsageError when another batch has the lock, or the folder cannot be made."""
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


def _opened(job: ImageJob) -> tuple[Image.Image, Mapping[str, Any]] | None:
    """The job's finished image and its metadata; None when its pixels turn out to be damaged."""
    try:
        with Image.open(job.path) as picture:
            picture.load()
        return picture, read_settings(job.path) or {}
    except (OSError, ValueError, SyntaxError):
        return None
