"""One queue of jobs and one thread that draws them."""

import base64
import io
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Condition, Thread
from types import TracebackType
from typing import Any, Self

from PIL import Image

from ...schemas.errors import CascadeError, UsageError
from ...schemas.stages import Stage
from ..batch.requests import Drawn, draw, groups
from ..batch.run import images_together
from ..cascade import Cascade
from ..images.png import image_paths, save_numbered
from ..sampling.loop import OnStep, Step
from .gallery import Gallery
from .pictures import Pictures
from .queued_job import CANCELLED, DONE, ERROR, NOTES, PREVIEW, QUEUED, STARTED, STEP, Job, Order

MOST_WAITING = 32
REMEMBERED = 64  # jobs, finished ones included
PREVIEW_SIDE = 512  # pixels, the longer side of what is sent to the page


class _CancelledError(Exception):
    """Leaves the sampling loop."""


class Studio:
    """Draws jobs one after the other, in a thread of its own for as long as its context lasts."""

    def __init__(
        self,
        cascade: Cascade,
        gallery: Gallery,
        pictures: Pictures,
        *,
        batch: int | None = None,
        say: Callable[[str], object] = lambda text: None,
    ) -> None:
        """`batch` images are drawn together, or what `images_together` says; `say` hears of each image saved."""
        self._cascade = cascade
        self._gallery = gallery
        self._pictures = pictures
        self._batch = batch
        self._say = say
        self._changed = Condition()
        self._waiting: deque[Job] = deque()
        self._jobs: OrderedDict[str, Job] = OrderedDict()  # the newest last
        self._closing = False
        self._thread = Thread(target=self._work, name="studio", daemon=True)

    def __enter__(self) -> Self:
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

    def submit(self, order: Order) -> Job:
        """Queue a job. Raises UsageError when too many wait."""
        job = Job(order)
        with self._changed:
            if len(self._waiting) >= MOST_WAITING:
                raise UsageError(f"{MOST_WAITING} jobs wait already; let some of them finish")
            self._waiting.append(job)
            self._jobs[job.id] = job
            for old in [old for old in self._jobs.values() if old.finished][: max(0, len(self._jobs) - REMEMBERED)]:
                del self._jobs[old.id]
            self._tell_places()
            self._changed.notify_all()
        return job

    def job(self, name: str) -> Job | None:
        with self._changed:
            return self._jobs.get(name)

    def unfinished(self) -> list[Job]:
        """Jobs that are drawn or wait, in order."""
        with self._changed:
            return [job for job in self._jobs.values() if not job.finished]

    def cancel(self, job: Job) -> None:
        """At once when it waits, else after the step that is being computed. A finished job stays as it is."""
        with self._changed:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
                job.tell(CANCELLED, images=[])
                self._tell_places()

    def _tell_places(self) -> None:
        running = sum(not job.finished for job in self._jobs.values()) - len(self._waiting)
        for place, job in enumerate(self._waiting):
            job.tell(QUEUED, ahead=place + running)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if self._closing:
                    return
                job = self._waiting.popleft()
            self._run(job)
            with self._changed:
                self._tell_places()

    def _run(self, job: Job) -> None:
        """Draw a job; whatever goes wrong becomes its last event."""
        try:
            job.tell(STARTED)
            self._draw(job)
        except _CancelledError:
            job.tell(CANCELLED, images=job.images)
        except CascadeError as error:
            job.tell(ERROR, message=str(error), images=job.images)
        except MemoryError:
            job.tell(ERROR, message="there is not enough memory; draw a smaller image, or fewer", images=job.images)
        except Exception as error:
            traceback.print_exc()
            message = f"something went wrong that should not ({type(error).__name__}); the terminal says more"
            job.tell(ERROR, message=message, images=job.images)
        else:
            job.tell(DONE, images=job.images)

    def _draw(self, job: Job) -> None:
        _leave_if_cancelled(job)
        requests = job.order.requests
        cut = self._cut(requests[0].prompt, requests[0].negative) if not requests[0].settings.long_prompts else []
        if cut:
            job.tell(NOTES, messages=[f"CLIP reads 77 tokens; not read: {text}" for text in cut])
        most = self._batch or images_together(requests[0].settings)
        began, done = time.monotonic(), 0
        for group in groups(requests, most):
            place = {"first": done + 1, "last": done + len(group), "of": len(requests), "began": began}
            on_step = _on_step(job, place)
            for drawn in draw(self._cascade, group, Path(), on_step):
                _leave_if_cancelled(job)
                self._save(job, drawn)
            done += len(group)

    def _save(self, job: Job, drawn: Drawn) -> None:
        (path,) = image_paths(self._gallery.folder, 1)
        path = save_numbered(path, drawn.image, self._pictures.keep(drawn.metadata))
        described = self._gallery.describe(path)
        assert described is not None
        job.images.append(described)
        self._say(f"wrote {path} ({drawn.image.width}x{drawn.image.height}, seed {drawn.request.seed})")

    def _cut(self, *texts: str) -> Sequence[str]:
        return [cut.strip() for cut in self._cascade.tokenizer(list(texts)).truncated if cut]


def _on_step(job: Job, place: dict[str, Any]) -> OnStep:
    """Tells of each step, shows it where that is wanted, and leaves when the job was cancelled."""
    began = place.pop("began")

    def on_step(stage: Stage, step: Step) -> None:
        _leave_if_cancelled(job)
        now = {"stage": stage, "index": step.index + 1, "steps": step.steps, **place}
        job.tell(STEP, **now, elapsed=round(time.monotonic() - began, 3))
        if stage in job.order.previews:
            job.tell(PREVIEW, **now, pictures=[_data_url(picture) for picture in step.preview()])
            _leave_if_cancelled(job)

    return on_step


def _leave_if_cancelled(job: Job) -> None:
    if job.cancelled:
        raise _CancelledError


def _data_url(picture: Image.Image) -> str:
    small = picture.copy()
    small.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    content = io.BytesIO()
    small.save(content, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
