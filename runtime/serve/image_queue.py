"""The bounded queue of the server, and the one thread that generates its images.

Images of different callers are computed together when they differ in prompts and seeds alone. Each image has a
generator of its own, from its seed.
"""

import math
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Condition, Thread
from types import TracebackType
from typing import Self

from PIL import Image

from ...schemas.errors import CascadeError, UsageError
from ...schemas.request import Request
from ...schemas.stages import Stage
from ..batch.generate_requests import GeneratedImage, generate_requests, request_groups, text_length
from ..cascade import Cascade
from ..sampling.loop import Step

MOST_PIXELS, MOST_STEPS = 4 << 20, 100  # of an image of one caller
RECENT = 0.2  # weight of the last batch in the mean time of an image
ENDING = "the server is ending; ask again when it is back"


class QueueMetrics:
    """The reports of a queue. This class ignores them; `metrics.Metrics` shows them to Prometheus."""

    def watch_queue(self, waiting: Callable[[], float]) -> None:
        """Report what `waiting` returns as the length of the queue."""

    def computed(self, images: int, seconds: float) -> None:
        """`images` were computed together in `seconds`."""

    def image(self, result: str) -> None:
        """An image is "done", "failed" or "cancelled"."""


class QueueFullError(Exception):
    """Too many images wait. `seconds` is an estimate of when there will be room."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"too many images wait; ask again in {seconds} s")
        self.seconds = seconds


@dataclass(frozen=True)
class PartialImage:
    """Preview `number`, from 0, of the image `index` of an order."""

    index: int
    number: int
    image: Image.Image


@dataclass(frozen=True)
class FinishedImage:
    """Image `index` of an order."""

    index: int
    generated: GeneratedImage


@dataclass(frozen=True)
class FailedImage:
    """Image `index` could not be generated; `expected` tells an error of cascadekit from an unexpected one."""

    index: int
    message: str
    expected: bool = True


Event = PartialImage | FinishedImage | FailedImage


@dataclass(eq=False)
class Order:
    """The images of one caller. `publish` is called in the queue's thread, with one final event for each image.

    `partials` is the number of previews of each image. The caller sets `cancelled` when it no longer waits, or gives
    `has_left`, which is asked before every batch and after every step."""

    requests: tuple[Request, ...]
    publish: Callable[[Event], object]
    partials: int = 0
    cancelled: bool = False
    has_left: Callable[[], bool] = lambda: False


@dataclass(frozen=True, eq=False)
class OrderedImage:
    """One image of an order."""

    order: Order
    index: int

    @property
    def request(self) -> Request:
        return self.order.requests[self.index]


class _NobodyWaitsError(Exception):
    """Raised in the sampling loop when all callers of a batch have left."""


@dataclass(eq=False)
class ImageQueue:
    """Generates the images of orders in the order of their arrival, as long as the queue's context lasts.

    At most `most_waiting` images wait; `together` are computed at once (None: as `images_together` returns)."""

    cascade: Cascade
    most_waiting: int
    together: int | None = None
    metrics: QueueMetrics = field(default_factory=QueueMetrics)
    _changed: Condition = field(default_factory=Condition)
    _waiting: deque[OrderedImage] = field(default_factory=deque)
    _seconds: float = 1.0  # of an image, recently
    _closing: bool = False

    def __post_init__(self) -> None:
        self.metrics.watch_queue(lambda: float(len(self._waiting)))

    def __enter__(self) -> Self:
        self._thread = Thread(target=self._run, name="images", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Stops after the step that is being computed; images that are not finished fail."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def submit(self, order: Order) -> None:
        """Queue an order. Raises QueueFullError when too many images wait, and when the server ends."""
        with self._changed:
            if self._closing or len(self._waiting) + len(order.requests) > self.most_waiting:
                raise QueueFullError(max(1, math.ceil(len(self._waiting) * self._seconds)))
            self._waiting += [OrderedImage(order, index) for index in range(len(order.requests))]
            self._changed.notify_all()

    def generate_all(self) -> None:
        """Generate everything that waits in the caller's thread, for a queue whose context was not entered."""
        while self._waiting:
            self._generate(self._next())

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if self._closing:
                    break
            self._generate(self._next())
        for image in self._waiting:
            self._fail(image, ENDING)

    def _next(self) -> list[OrderedImage]:
        """Take the first image out of the queue, and those that can be computed with it. Drops what was cancelled."""
        with self._changed:
            _notice_who_left(self._waiting)
            for _ in [image for image in self._waiting if image.order.cancelled]:
                self.metrics.image("cancelled")
            self._waiting = deque(image for image in self._waiting if not image.order.cancelled)
            waiting = list(self._waiting)
        alike = [image for image in waiting if image.request.group == waiting[0].request.group]
        length = partial(text_length, self.cascade)
        groups = request_groups([image.request for image in alike], self.together, length)
        taken = alike[: len(next(groups, []))]
        with self._changed:
            for image in taken:
                self._waiting.remove(image)
        return taken

    def _generate(self, images: Sequence[OrderedImage]) -> None:
        """Generate images together, and each alone if that fails; an error becomes the event of its image."""
        if not images:
            return
        began = time.monotonic()
        try:
            found = generate_requests(
                self.cascade, [image.request for image in images], lambda stage, step: self._step(images, stage, step)
            )
        except _NobodyWaitsError:
            for image in images:
                self._fail(image, ENDING)
        except (CascadeError, MemoryError) as error:
            if len(images) > 1:
                for image in images:
                    self._generate([image])
                return
            self._fail(images[0], str(error) or "not enough memory; ask for a smaller image")
        except Exception as error:
            traceback.print_exc()
            for image in images:
                self._fail(image, f"an unexpected error ({type(error).__name__})", expected=False)
        else:
            seconds = time.monotonic() - began
            self._seconds += RECENT * (seconds / len(images) - self._seconds)
            self.metrics.computed(len(images), seconds)
            for image, generated in zip(images, found, strict=True):
                self.metrics.image("cancelled" if image.order.cancelled else "done")
                image.order.publish(FinishedImage(image.index, generated))

    def _fail(self, image: OrderedImage, message: str, *, expected: bool = True) -> None:
        self.metrics.image("cancelled" if image.order.cancelled else "failed")
        image.order.publish(FailedImage(image.index, message, expected))

    def _step(self, images: Sequence[OrderedImage], stage: Stage, step: Step) -> None:
        """Publish the previews of a step to those who asked for them."""
        _notice_who_left(images)
        if self._closing or all(image.order.cancelled for image in images):
            raise _NobodyWaitsError
        shown_stage = Stage.PRIOR if Stage.PREVIEWER in self.cascade.manifest.stages else Stage.DECODER
        numbers = [partial_number(image.order.partials, step) for image in images]
        if stage is not shown_stage or all(number is None for number in numbers):
            return
        for image, number, picture in zip(images, numbers, step.preview(), strict=True):
            if number is not None and not image.order.cancelled:
                image.order.publish(PartialImage(image.index, number, picture))


def _notice_who_left(images: Iterable[OrderedImage]) -> None:
    for order in {image.order for image in images}:
        order.cancelled = order.cancelled or order.has_left()


def partial_number(partials: int, step: Step) -> int | None:
    """The number of the preview after this step, when `partials` previews are spread over a stage; None for none."""
    ends = sorted({(part + 1) * step.steps // (partials + 1) for part in range(partials)} - {0})
    return ends.index(step.index + 1) if step.index + 1 in ends else None


def require_served(request: Request) -> None:
    """Raise UsageError for an image of more pixels, or more steps of a stage, than one caller may ask for."""
    settings = request.settings
    if settings.width * settings.height > MOST_PIXELS:
        raise UsageError(f"size: {settings.width}x{settings.height}: expected at most {MOST_PIXELS} pixels")
    asked = max(settings.prior_steps, settings.decoder_steps)
    asked = max(asked, len(settings.prior_timesteps) - 1, len(settings.decoder_timesteps) - 1)
    if asked > MOST_STEPS:
        raise UsageError(f"steps: {asked}: expected at most {MOST_STEPS}")
