"""OpenAI's images API over one cascade: its routes and their answers."""

import asyncio
import base64
import json
import secrets
import tempfile
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ...schemas.json_text import load_object
from ..batch.picture_hashes import with_pictures
from ..cascade import Cascade
from ..images.png import Sign, image_bytes
from ..images.provenance import MEDIA
from .guard import DESCRIBED, ApiError, error_reply
from .image_call import ImageCall, edited_pictures, parse_image_call
from .image_queue import Event, FailedImage, FinishedImage, ImageQueue, Order, PartialImage
from .metrics import TYPE, Metrics

KEPT_FILES = 64  # images that callers asked for as url; older ones are forgotten
MOST_FILES, MOST_FIELDS = 17, 64  # of a form
BEAT = 10.0  # seconds without an event until a stream sends a comment
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
METRICS = "/metrics"
NAMES = {GENERATIONS: "image_generation", EDITS: "image_edit"}  # of the events of a stream
NO_USAGE = {  # clients of other languages expect the field
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}

NOTHING = nullcontext()


@dataclass
class ImagesApi:
    """The routes of one cascade, which callers know as `model`. `log_prompts` puts prompts into the request log. `sign`
    signs each finished image."""

    cascade: Cascade
    model: str
    queue: ImageQueue
    metrics: Metrics
    log_prompts: bool = False
    sign: Sign | None = None
    _files: OrderedDict[str, bytes] = field(default_factory=OrderedDict)
    _created: int = field(default_factory=lambda: int(time.time()))

    def routes(self) -> list[Route]:
        return [
            Route("/health", self.health),
            Route(METRICS, self.show_metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{name}", self.model_called),
            Route(GENERATIONS, self.generate, methods=["POST"]),
            Route(EDITS, self.edit, methods=["POST"]),
            Route("/v1/files/{name}", self.file),
        ]

    async def health(self, request: HttpRequest) -> Response:
        return JSONResponse({"status": "ok", "model": self.model})

    async def show_metrics(self, request: HttpRequest) -> Response:
        return Response(self.metrics.text(), media_type=TYPE)

    async def models(self, request: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def model_called(self, request: HttpRequest) -> Response:
        self._require_model(request.path_params["name"])
        return JSONResponse(self._described())

    async def file(self, request: HttpRequest) -> Response:
        name = request.path_params["name"]
        if name not in self._files:
            raise ApiError(404, f"there is no such image (any more); the newest {KEPT_FILES} are kept")
        return Response(self._files[name], media_type=MEDIA[Path(name).suffix])

    async def generate(self, request: HttpRequest) -> Response:
        try:
            given = load_object(await request.body(), strict=True)
        except ValueError:
            raise ApiError(400, "the body is not a JSON object") from None
        self._require_model(given.get("model"))
        call = parse_image_call(given, self.cascade.manifest)
        return await (_started(self._events(request, call)) if call.streamed else self._answer(request, call))

    async def edit(self, request: HttpRequest) -> Response:
        with ExitStack() as held:
            folder = held.enter_context(tempfile.TemporaryDirectory(prefix="cascadekit-"))
            async with request.form(max_files=MOST_FILES, max_fields=MOST_FIELDS) as form:
                given = {name: value for name, value in form.items() if isinstance(value, str)}
                uploads = [(name, each) for name, each in form.multi_items() if isinstance(each, UploadFile)]
                images = [
                    await _saved(each, Path(folder, f"image {number}"))
                    for number, (name, each) in enumerate(uploads, 1)
                    if name in ("image", "image[]")
                ]
                masks = [await _saved(each, Path(folder, "mask")) for name, each in uploads if name == "mask"]
            self._require_model(given.get("model"))
            pictures = await run_in_threadpool(edited_pictures, images, masks[0] if masks else None)
            call = parse_image_call(given, self.cascade.manifest, pictures)
            if call.streamed:
                return await _started(self._events(request, call, held.pop_all()))
            return await self._answer(request, call)

    def _described(self) -> dict[str, Any]:
        return {"id": self.model, "object": "model", "created": self._created, "owned_by": "cascadekit"}

    def _require_model(self, name: Any) -> None:
        if name not in (None, "", self.model):
            raise ApiError(404, f"model: expected {self.model!r}, found {str(name)[:100]!r}", "model_not_found")

    async def _answer(self, request: HttpRequest, call: ImageCall) -> Response:
        self._describe(request, call)
        order, inbox = self._submit(call)
        leaving = asyncio.create_task(_left(request))
        collecting = asyncio.create_task(_collected(inbox, len(call.requests)))
        try:
            await asyncio.wait((leaving, collecting), return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                raise ConnectionError("the client left")
            images = await collecting
        finally:
            order.cancelled = True  # without effect on finished images
            leaving.cancel()
            collecting.cancel()
        data = [await run_in_threadpool(self._entry, request, call, image) for image in images]
        return JSONResponse({"created": int(time.time()), "data": data, **call.described})

    def _describe(self, request: HttpRequest, call: ImageCall) -> None:
        """Leave words for the log."""
        first = call.requests[0]
        words = [f"n={len(call.requests)}", call.size, f"seed={first.seed}"]
        request.scope[DESCRIBED] = [*words, json.dumps(first.prompt)] if self.log_prompts else words

    def _submit(self, call: ImageCall) -> tuple[Order, "asyncio.Queue[Event]"]:
        loop, inbox = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def publish(event: Event) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(inbox.put_nowait, event)

        order = Order(call.requests, publish, call.partials)
        self.queue.submit(order)
        return order, inbox

    def _entry(self, request: HttpRequest, call: ImageCall, image: FinishedImage) -> dict[str, Any]:
        content = _encoded(call, image.generated.image, image.generated.metadata, self.sign)
        seed = {"seed": image.generated.request.seed}
        if not call.as_url:
            return {"b64_json": base64.b64encode(content).decode(), **seed}
        name = secrets.token_urlsafe(24) + call.suffix
        self._files[name] = content
        while len(self._files) > KEPT_FILES:
            self._files.popitem(last=False)
        return {"url": str(request.url_for("file", name=name)), **seed}

    async def _events(
        self, request: HttpRequest, call: ImageCall, held: AbstractContextManager[Any] = NOTHING
    ) -> AsyncIterator[bytes]:
        """The events of a stream: previews, then one completed event for each image, or one error.

        `held` ends with the stream."""
        self._describe(request, call)
        with held:
            order, inbox = self._submit(call)
            left = len(call.requests)
            try:
                yield b": queued\n\n"
                while left:
                    try:
                        event = await asyncio.wait_for(inbox.get(), BEAT)
                    except TimeoutError:
                        yield b": waiting\n\n"
                        continue
                    yield await run_in_threadpool(_sent, NAMES[request.url.path], call, event, self.sign)
                    left = 0 if isinstance(event, FailedImage) else left - isinstance(event, FinishedImage)
            finally:
                order.cancelled = True  # without effect on finished images


def _sent(name: str, call: ImageCall, event: Event, sign: Sign | None) -> bytes:
    """An event of an order as a server-sent event; `name` is "image_generation" or "image_edit"."""
    if isinstance(event, FailedImage):
        error = error_reply(400 if event.expected else 500, event.message)
        return b"event: error\ndata: " + bytes(error.body) + b"\n\n"
    data: dict[str, Any] = {"created_at": int(time.time()), "image_index": event.index, **call.described}
    if isinstance(event, PartialImage):
        content = _encoded(call, event.image, {})
        data |= {"type": f"{name}.partial_image", "partial_image_index": event.number}
    else:
        generated = event.generated
        content = _encoded(call, generated.image, generated.metadata, sign)
        data |= {"type": f"{name}.completed", "usage": NO_USAGE, "seed": generated.request.seed}
    data["b64_json"] = base64.b64encode(content).decode()
    return f"event: {data['type']}\ndata: {json.dumps(data)}\n\n".encode()


async def _started(events: AsyncIterator[bytes]) -> Response:
    """A stream of `events` whose order is accepted: a full queue is refused with a status."""
    first = await anext(events)

    async def rest() -> AsyncIterator[bytes]:
        yield first
        async for event in events:
            yield event

    return StreamingResponse(rest(), media_type="text/event-stream")


async def _left(request: HttpRequest) -> None:
    """Wait until the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _collected(inbox: "asyncio.Queue[Event]", count: int) -> list[FinishedImage]:
    """The finished images of an order, in its order. Raises ApiError when one of them fails."""
    found: list[FinishedImage] = []
    while len(found) < count:
        event = await inbox.get()
        if isinstance(event, FailedImage):
            raise ApiError(400 if event.expected else 500, event.message)
        if isinstance(event, FinishedImage):
            found.append(event)
    return sorted(found, key=lambda image: image.index)


async def _saved(upload: UploadFile, path: Path) -> Path:
    """Write an uploaded file to `path`, whose name stands in messages, and return it."""
    await run_in_threadpool(path.write_bytes, await upload.read())
    return path


def _encoded(call: ImageCall, image: Image.Image, metadata: Mapping[str, Any], sign: Sign | None = None) -> bytes:
    """The image file, with its settings, in which pictures have no paths: those of the server are nobody's business."""
    shown = with_pictures(metadata, lambda picture: {**picture, "path": "uploaded"})
    return image_bytes(Path(f"image{call.suffix}"), image, shown, sign)
