"""Generates the images of jobs in this process."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

from ...schemas.callbacks import ignored
from ...schemas.errors import CascadeError, CheckpointError, UsageError
from ...schemas.messages import one_line
from ...schemas.stages import Stage
from ..cascade import Cascade
from ..images.png import Sign, image_bytes
from ..sampling.loop import Step
from .batch_runner import GeneratedGroup
from .generate_requests import GeneratedImage, encode_requests, generate_requests, text_length
from .image_jobs import KEY, ImageJob
from .job_groups import job_groups, windows

PROMPTS_AT_ONCE = 8  # encoded with their negatives between two calls of `check`

OnStep = Callable[[Sequence[ImageJob], Stage, Step], object]


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
class LocalGroups:
    """Generates the images of jobs with `cascade`, `together` at once (None: see `images_together`).

    `sign` signs each file, see `images.provenance`. `on_step` is called after every step, with the jobs whose images
    are being generated. `check` is called wherever the run can stop without loss. Both may raise an exception to stop
    the run, other than CascadeError, OSError and MemoryError, which mean that an image failed."""

    cascade: Cascade
    together: int | None = None
    sign: Sign | None = None
    on_step: OnStep = ignored
    check: Callable[[], object] = ignored

    def __call__(self, jobs: Sequence[ImageJob]) -> Iterator[GeneratedGroup]:
        """Yield each group once its images are computed. Raises CheckpointError when the bundle is damaged."""
        for window in windows(jobs):
            clock = Stopwatch()
            self._encode(window)  # all of them first: the text encoder is loaded once
            groups = list(job_groups(window, self.together, partial(text_length, self.cascade)))
            clock.lap(Stage.TEXT_ENCODER)
            for group in groups:
                self.check()
                yield from self._generated(group, clock)
                clock = Stopwatch()

    def _encode(self, jobs: Sequence[ImageJob]) -> None:
        def how(job: ImageJob) -> tuple[bool, bool]:
            return job.request.settings.weighted, job.request.settings.long_prompts

        for _, alike in groupby(sorted(jobs, key=how), key=how):
            members = list(alike)
            for start in range(0, len(members), PROMPTS_AT_ONCE):
                self.check()
                with suppress(UsageError):  # reported with the image
                    encode_requests(self.cascade, [job.request for job in members[start : start + PROMPTS_AT_ONCE]])

    def _generated(self, group: Sequence[ImageJob], clock: Stopwatch) -> Iterator[GeneratedGroup]:
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
                yield GeneratedGroup(group, error=one_line(error))
                return
        else:
            clock.lap(Stage.VQGAN)
            yield GeneratedGroup(group, png_files(group, images, self.sign), clock.rounded())
            return
        for job in group:
            self.check()
            yield from self._generated([job], clock)


def png_files(jobs: Sequence[ImageJob], images: Sequence[GeneratedImage], sign: Sign | None = None) -> list[bytes]:
    """The bytes of each job's file. Its key is in the metadata, so that a later run sees that the job is done."""
    return [
        image_bytes(job.path, one.image, {**one.metadata, KEY: job.key}, sign)
        for job, one in zip(jobs, images, strict=True)
    ]
