"""The routes of the page: a function for each address."""

import base64
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from importlib.resources import files
from typing import Any, BinaryIO

from ...schemas.manifest import Manifest
from .gallery import Gallery
from .http_messages import Call, RefusedError, Reply, Route, json_reply
from .http_server import CHUNK
from .page_request import describe, parse_page_request
from .queue import JobQueue
from .queued_job import QueuedJob
from .uploads import Uploads

MOST_JSON, MOST_PICTURE = 256 << 10, 32 << 20  # bytes of a body
SHOWN = 48  # images of the gallery unless more are asked for
MOST_SHOWN = 10_000

POLICY = (
    "default-src 'self'; script-src {script}; style-src {style}; img-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class App:
    """The parts that the routes use. `about` describes the engine, the LoRAs and the output folder to the page."""

    manifest: Manifest
    queue: JobQueue
    gallery: Gallery
    pictures: Uploads
    loras: Sequence[tuple[str, float]]
    about: dict[str, Any]

    @cached_property
    def page(self) -> bytes:
        return files(__package__).joinpath("index.html").read_bytes()

    @cached_property
    def policy(self) -> str:
        """The Content-Security-Policy of the page, which allows its own script and style alone, by their hashes."""
        return POLICY.format(script=_hash_of(self.page, b"script"), style=_hash_of(self.page, b"style"))

    def job(self, call: Call) -> QueuedJob:
        job = self.queue.job(call.groups["id"])
        if job is None:
            raise RefusedError(HTTPStatus.NOT_FOUND, "there is no such job (any more)")
        return job


def _page(app: App, call: Call) -> Reply:
    headers = {"Content-Security-Policy": app.policy, "Cache-Control": "no-cache"}
    return Reply(app.page, "text/html; charset=utf-8", headers=headers)


def _info(app: App, call: Call) -> Reply:
    return json_reply({**describe(app.manifest), **app.about, "picture_bytes": MOST_PICTURE})


def _add_picture(app: App, call: Call) -> Reply:
    return json_reply({"id": app.pictures.add(call.body)}, HTTPStatus.CREATED)


def _picture(app: App, call: Call) -> Reply:
    if app.pictures.find(call.groups["id"]) is None:
        raise RefusedError(HTTPStatus.NOT_FOUND, "there is no such picture")
    content = io.BytesIO()
    app.pictures.shown(call.groups["id"]).save(content, "JPEG", quality=90)
    return Reply(content.getvalue(), "image/jpeg", headers={"Cache-Control": "private, max-age=3600"})


def _submit(app: App, call: Call) -> Reply:
    request = parse_page_request(call.json(), app.manifest, app.pictures, app.loras)
    return json_reply(app.queue.submit(request).to_json(), HTTPStatus.CREATED)


def _jobs(app: App, call: Call) -> Reply:
    return json_reply({"jobs": [job.to_json() for job in app.queue.unfinished()]})


def _events(app: App, call: Call) -> Reply:
    seen = call.headers.get("Last-Event-ID", "")
    job = app.job(call)
    return Reply(_stream(job, int(seen) if re.fullmatch(r"\d{1,9}", seen) else 0), "text/event-stream")


def _stream(job: QueuedJob, seen: int) -> Iterator[bytes]:
    """Server-sent events of a job, with comments between them, whose sending fails once the client is gone."""
    for event in job.events(seen):
        if event is None:
            yield b": waiting\n\n"
        else:
            yield f"id: {event.version}\nevent: {event.name}\ndata: {json.dumps(event.data)}\n\n".encode()


def _cancel(app: App, call: Call) -> Reply:
    app.queue.cancel(job := app.job(call))
    return json_reply(job.to_json())


def _images(app: App, call: Call) -> Reply:
    count = call.query.get("count", str(SHOWN))
    if not re.fullmatch(r"\d{1,9}", count):
        raise RefusedError(HTTPStatus.BAD_REQUEST, "count: expected a number")
    images, more = app.gallery.newest(min(int(count), MOST_SHOWN))
    return json_reply({"images": images, "more": more})


def _image(app: App, call: Call) -> Reply:
    path = app.gallery.file(call.groups["name"])
    if path is None:
        raise RefusedError(HTTPStatus.NOT_FOUND, "there is no such image")
    try:
        file = path.open("rb")
    except OSError:
        raise RefusedError(HTTPStatus.NOT_FOUND, "there is no such image (any more)") from None
    length = os.fstat(file.fileno()).st_size
    return Reply(_pieces(file, length), "image/png", headers={"Cache-Control": "private, max-age=3600"}, length=length)


def _pieces(file: BinaryIO, length: int) -> Iterator[bytes]:
    """The first `length` bytes of a file in pieces, as many clients may ask for large images. Closes the file."""
    with file:
        while length > 0 and (piece := file.read(min(length, CHUNK))):
            length -= len(piece)
            yield piece


ROUTES: Sequence[Route] = (
    Route("GET", r"/", _page),
    Route("GET", r"/api/info", _info),
    Route("POST", r"/api/pictures", _add_picture, MOST_PICTURE, ("application/octet-stream",)),
    Route("GET", r"/api/pictures/(?P<id>[0-9a-f]{64})", _picture),
    Route("POST", r"/api/jobs", _submit, MOST_JSON, ("application/json",)),
    Route("GET", r"/api/jobs", _jobs),
    Route("GET", r"/api/jobs/(?P<id>[0-9a-f]+)/events", _events),
    Route("POST", r"/api/jobs/(?P<id>[0-9a-f]+)/cancel", _cancel, MOST_JSON, ("application/json",)),
    Route("GET", r"/api/images", _images),
    Route("GET", r"/images/(?P<name>[^/]+\.png)", _image),
)


def _hash_of(page: bytes, element: bytes) -> str:
    """The hash of the page's one element of that name, as a Content-Security-Policy names it."""
    (content,) = re.findall(b"<%s>(.*?)</%s>" % (element, element), page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"
