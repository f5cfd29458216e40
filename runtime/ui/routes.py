"""The routes of the page: a function for each address."""

import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from importlib.resources import files
from typing import BinaryIO

from .gallery import Gallery
from .http_messages import Call, RefusedError, Reply, Route, json_reply
from .http_server import CHUNK
from .models import Models
from .page_request import describe, parse_page_request
from .queue import JobQueue
from .queued_job import QueuedJob
from .trash import Trash
from .uploads import Uploads

MOST_JSON, MOST_PICTURE = 256 << 10, 32 << 20  # bytes of a body
SHOWN = 48  # images of the gallery unless more are asked for
MOST_SHOWN = 10_000
MOST_SEARCH = 1000  # characters

# Scripts and styles are the files in the folder `page` alone: no other route sends a type that a browser would run.
POLICY = (
    "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TYPES: Mapping[str, str] = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
INDEX = "index.html"


@dataclass(frozen=True)
class App:
    """The parts that the routes use. `open_folder` shows the folder of the images on the screen; None: it cannot."""

    models: Models
    queue: JobQueue
    gallery: Gallery
    pictures: Uploads
    trash: Trash
    open_folder: Callable[[], None] | None = None

    def job(self, call: Call) -> QueuedJob:
        job = self.queue.job(call.groups["id"])
        if job is None:
            raise RefusedError(HTTPStatus.NOT_FOUND, "there is no such job (any more)")
        return job


@cache
def _page_files() -> Mapping[str, bytes]:
    """The files that make the page, by name."""
    folder = files(__package__).joinpath("page")
    return {file.name: file.read_bytes() for file in folder.iterdir() if os.path.splitext(file.name)[1] in TYPES}


def _page(app: App, call: Call) -> Reply:
    name = call.groups.get("file", INDEX)
    content = _page_files().get(name)
    if content is None:
        raise RefusedError(HTTPStatus.NOT_FOUND, "there is nothing here")
    headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
    return Reply(content, f"{TYPES[os.path.splitext(name)[1]]}; charset=utf-8", headers=headers)


def _info(app: App, call: Call) -> Reply:
    first, loras = app.models.first, app.models.offered_loras()
    names = {given: name for name, given in loras.items()}
    return json_reply(
        {
            "bundles": list(app.models.bundles),
            "loras": list(loras),
            "bundle": first.bundle,
            "engine": first.engine,
            "chosen_loras": [{"name": names[lora], "strength": strength} for lora, strength in first.loras],
            "output": str(app.gallery.folder),
            "opens_folder": app.open_folder is not None,
            "picture_bytes": MOST_PICTURE,
        }
    )


def _bundle(app: App, call: Call) -> Reply:
    name = call.groups["name"]
    if name not in app.models.bundles:
        raise RefusedError(HTTPStatus.NOT_FOUND, "there is no such bundle (any more)")
    manifest = app.models.manifest(name)
    return json_reply({"name": name, **describe(manifest), "engines": app.models.engines(manifest)})


def _add_picture(app: App, call: Call) -> Reply:
    return json_reply({"id": app.pictures.add(call.body)}, HTTPStatus.CREATED)


def _picture(app: App, call: Call) -> Reply:
    if app.pictures.find(call.groups["id"]) is None:
        raise RefusedError(HTTPStatus.NOT_FOUND, "there is no such picture")
    content = io.BytesIO()
    app.pictures.shown(call.groups["id"]).save(content, "JPEG", quality=90)
    return Reply(content.getvalue(), "image/jpeg", headers={"Cache-Control": "private, max-age=3600"})


def _has_picture(app: App, call: Call) -> Reply:
    return json_reply({"present": app.pictures.find(call.groups["id"]) is not None})


def _submit(app: App, call: Call) -> Reply:
    request = parse_page_request(call.json(), app.models, app.pictures)
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
    search = call.query.get("search", "")
    if len(search) > MOST_SEARCH:
        raise RefusedError(HTTPStatus.BAD_REQUEST, f"search: expected at most {MOST_SEARCH} characters")
    images, more = app.gallery.newest(min(int(count), MOST_SHOWN), search)
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


def _delete(app: App, call: Call) -> Reply:
    token = app.trash.delete(call.groups["name"])
    if token is None:
        raise RefusedError(HTTPStatus.NOT_FOUND, "there is no such image (any more)")
    return json_reply({"restore": token})


def _restore(app: App, call: Call) -> Reply:
    name = app.trash.restore(call.groups["id"])
    if name is None:
        raise RefusedError(HTTPStatus.NOT_FOUND, "the deleted image is not there (any more)")
    return json_reply({"name": os.fsencode(name).decode("utf-8", "replace")})


def _open_folder(app: App, call: Call) -> Reply:
    if app.open_folder is None:
        raise RefusedError(HTTPStatus.NOT_FOUND, "the folder cannot be shown here; open it yourself")
    app.open_folder()
    return json_reply({})


JSON = ("application/json",)

ROUTES: Sequence[Route] = (
    Route("GET", r"/", _page),
    Route("GET", r"/page/(?P<file>[a-z_]+\.(?:css|js))", _page),
    Route("GET", r"/api/info", _info),
    Route("GET", r"/api/bundles/(?P<name>[^/]+)", _bundle),
    Route("POST", r"/api/pictures", _add_picture, MOST_PICTURE, ("application/octet-stream",)),
    Route("GET", r"/api/pictures/(?P<id>[0-9a-f]{64})", _picture),
    Route("GET", r"/api/pictures/(?P<id>[0-9a-f]{64})/present", _has_picture),
    Route("POST", r"/api/jobs", _submit, MOST_JSON, JSON),
    Route("GET", r"/api/jobs", _jobs),
    Route("GET", r"/api/jobs/(?P<id>[0-9a-f]+)/events", _events),
    Route("POST", r"/api/jobs/(?P<id>[0-9a-f]+)/cancel", _cancel, MOST_JSON, JSON),
    Route("GET", r"/api/images", _images),
    Route("GET", r"/images/(?P<name>[^/]+\.png)", _image),
    Route("POST", r"/images/(?P<name>[^/]+\.png)/delete", _delete, MOST_JSON, JSON),
    Route("POST", r"/api/trash/(?P<id>[0-9a-f]+)/restore", _restore, MOST_JSON, JSON),
    Route("POST", r"/api/folder/open", _open_folder, MOST_JSON, JSON),
)
