"""The queue of the page's jobs, and the one thread that generates their images."""

import base64
import io
import time
import traceback
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from threading import Condition, Thread
from types import TracebackType
from typing import Self

from PIL import Image

from ...schemas.callbacks import Say, ignored
from ...schemas.errors import CascadeError, UsageError
from ...schemas.stages import Stage
from ..batch.generate_requests import GeneratedImage, generate_requests, request_groups
from ..cascade import Cascade
from ..images.png import Sign, image_paths, save_numbered
from ..sampling.loop import OnStep, Step
from .gallery import Gallery
from .models import Models
from .queued_job import (
    CANCELLED,
    DONE,
    ERROR,
    NOTES,
    OPENING,
    PREVIEW,
    QUEUED,
    STARTED,
    STEP,
    PageRequest,
    QueuedJob,
)
from .uploads import Uploads

MOST_WAITING = 32
REMEMBERED = 64  # jobs that can be asked for, finished ones included
PREVIEW_SIDE = 512  # pixels, the longer side of what is sent to the page


class _CancelledError(Exception):
    """Raised in the sampling loop of a job that was cancelled."""


@dataclass(eq=False)
class JobQueue:
    """Generates the images of jobs, one job after the other, in a thread that runs as long as the queue's context.

    `batch` images are computed together (None: as many as `images_together` returns). `sign` signs each file. `say` is
    called with a line for each saved image."""

    models: Models
    gallery: Gallery
    pictures: Uploads
    batch: int | None = None
    sign: Sign | None = None
    say: Say = ignored
    _changed: Condition = field(default_factory=Condition)
    _waiting: deque[QueuedJob] = field(default_factory=deque)
    _jobs: OrderedDict[str, QueuedJob] = field(default_factory=OrderedDict)  # the newest last
    _closing: bool = False

    def __enter__(self) -> Self:
        self._thread = Thread(target=self._run_jobs, name="queue", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Cancels all jobs and waits for the step that is being computed."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for job in self.unfinished():
            self.cancel(job)
        self._thread.join()

    def submit(self, request: PageRequest) -> QueuedJob:
        """Queue a job. Raises UsageError when too many wait."""
        job = QueuedJob(request)
        with self._changed:
            if len(self._waiting) >= MOST_WAITING:
                raise UsageError(f"{MOST_WAITING} jobs wait already; let some of them finish")
            self._waiting.append(job)
            self._jobs[job.id] = job
            for old in [old for old in self._jobs.values() if old.finished][: max(0, len(self._jobs) - REMEMBERED)]:
                del self._jobs[old.id]
            self._publish_places()
            self._changed.notify_all()
        return job

    def job(self, name: str) -> QueuedJob | None:
        with self._changed:
            return self._jobs.get(name)

    def unfinished(self) -> list[QueuedJob]:
        """The running job and the waiting ones, in order."""
        with self._changed:
            return [job for job in self._jobs.values() if not job.finished]

    def cancel(self, job: QueuedJob) -> None:
        """Cancel a waiting job at once, and a running one after its current step. A finished job stays as it is."""
        with self._changed:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
                job.publish(CANCELLED, images=[])
                self._publish_places()

    def _publish_places(self) -> None:
        running = sum(not job.finished for job in self._jobs.values()) - len(self._waiting)
        for place, job in enumerate(self._waiting):
            job.publish(QUEUED, ahead=place + running)

    def _run_jobs(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if self._closing:
                    return
                job = self._waiting.popleft()
            self._run(job)
            with self._changed:
                self._publish_places()

    def _run(self, job: QueuedJob) -> None:
        """Generate the images of a job; an error becomes its last event."""
        try:
            if not self.models.is_open(job.request.choice):
                job.publish(OPENING, loras=len(job.request.choice.loras))
            cascade = self.models.cascade(job.request.choice)
            job.publish(STARTED)
            self._generate(job, cascade)
        except _CancelledError:
            job.publish(CANCELLED, images=job.images)
        except CascadeError as error:
            job.publish(ERROR, message=str(error), images=job.images)
        except MemoryError:
            job.publish(ERROR, message="not enough memory; generate fewer or smaller images", images=job.images)
        except Exception as error:
            traceback.print_exc()
            message = f"an unexpected error ({type(error).__name__}); see the terminal"
            job.publish(ERROR, message=message, images=job.images)
        else:
            job.publish(DONE, images=job.images)

    def _generate(self, job: QueuedJob, cascade: Cascade) -> None:
        _leave_if_cancelled(job)
        requests = job.request.requests
        texts = [] if requests[0].settings.long_prompts else [requests[0].prompt, requests[0].negative]
        if cut := [text for text in cascade.tokenizer(texts).truncated if text]:
            job.publish(NOTES, messages=[f"CLIP reads 77 tokens; not read: {text}" for text in cut])
        began, done = time.monotonic(), 0
        for group in request_groups(requests, self.batch):
            place = {"first": done + 1, "last": done + len(group), "of": len(requests)}
            for generated in generate_requests(cascade, group, _on_step(job, place, began)):
                _leave_if_cancelled(job)
                self._save(job, generated)
            done += len(group)

    def _save(self, job: QueuedJob, generated: GeneratedImage) -> None:
        (path,) = image_paths(self.gallery.folder, 1)
        path = save_numbered(path, generated.image, self.pictures.keep(generated.metadata), sign=self.sign)
        described = self.gallery.describe(path)
        assert described is not None
        job.images.append(described)
        self.say(f"wrote {path} ({generated.image.width}x{generated.image.height}, seed {generated.request.seed})")


def _on_step(job: QueuedJob, place: dict[str, int], began: float) -> OnStep:
    """A function that publishes each step and its previews, and raises _CancelledError for a cancelled job."""

    def on_step(stage: Stage, step: Step) -> None:
        _leave_if_cancelled(job)
        now = {"stage": stage, "index": step.index + 1, "steps": step.steps, **place}
        job.publish(STEP, **now, elapsed=round(time.monotonic() - began, 3))
        if stage in job.request.previews:
            job.publish(PREVIEW, **now, pictures=[_data_url(picture) for picture in step.preview()])
            _leave_if_cancelled(job)

    return on_step


def _leave_if_cancelled(job: QueuedJob) -> None:
    if job.cancelled:
        raise _CancelledError


def _data_url(picture: Image.Image) -> str:
    small = picture.copy()
    small.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    content = io.BytesIO()
    small.save(content, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
