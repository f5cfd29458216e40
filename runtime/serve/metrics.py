"""The counters of the server, in the text format of Prometheus."""

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .image_queue import QueueMetrics

TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300)
IMAGES = (1, 2, 4, 8, 16, 32, 64)


class Metrics(QueueMetrics):
    """The counters of one server. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        here: Any = {"registry": self._registry, "namespace": "cascadekit"}
        self._requests = Counter("requests", "Requests by route and status.", ("route", "status"), **here)
        self._seconds = Histogram(
            "request_seconds", "Time until a request was answered.", ("route",), buckets=SECONDS, **here
        )
        self._images = Counter("images", "Images by how they ended.", ("result",), **here)
        self._batches = Histogram("batch_images", "Images that were computed together.", buckets=IMAGES, **here)
        self._image_seconds = Counter("generating_seconds", "Time that images were being computed.", **here)
        self._waiting = Gauge("waiting_images", "Images in the queue.", **here)

    def watch_queue(self, waiting: Callable[[], float]) -> None:
        self._waiting.set_function(waiting)

    def answered(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def computed(self, images: int, seconds: float) -> None:
        self._batches.observe(images)
        self._image_seconds.inc(seconds)

    def image(self, result: str) -> None:
        self._images.labels(result).inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)
