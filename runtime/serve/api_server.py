"""The server that carries the images API: where it listens, whom it answers, and when it hangs up."""

import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from anyio import to_thread
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ...schemas.callbacks import Say, ignored
from ...schemas.limits import MAX_BACKLOG, MAX_CONNECTIONS, MAX_HEAD
from ..cascade import Cascade
from ..images.png import Sign
from ..server_address import address_family, cannot_listen, own_names, server_url
from .guard import EXPECTED, OPEN, PATIENCE, ApiError, Guard, reply_to
from .image_queue import ImageQueue
from .images_api import EDITS, METRICS, ImagesApi
from .metrics import Metrics

THREADS = 4  # that encode images and keep uploads; memory grows with their number, as each has some of its own


def _failed(request: HttpRequest, error: Exception) -> Response:
    return reply_to(error)


@dataclass(frozen=True)
class ServeOptions:
    """Where and for whom the server works.

    `port=0` takes a free one. `queue` images wait at most. `together` are computed at once (None: as
    `images_together` returns). `open_metrics` answers /metrics without the key. `patience` are the seconds that running
    requests have when the server ends. `sign` signs each finished image, see `images.provenance`."""

    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    queue: int = 64
    together: int | None = None
    log_prompts: bool = False
    open_metrics: bool = False
    patience: int = 30
    sign: Sign | None = None


class ApiServer(uvicorn.Server):
    """A server that listens; `serve_forever` answers until a signal, or until `should_exit` is set.

    A connection that waits for its client for `PATIENCE` seconds is ended, as few are open at the same time."""

    def __init__(self, config: uvicorn.Config, listening: socket.socket) -> None:
        super().__init__(config)
        self._listening = listening
        self._waiting: dict[Any, tuple[Any, float]] = {}  # by connection: the state in which it waits, and since when
        self.url = server_url(*listening.getsockname()[:2])

    def serve_forever(self) -> None:
        self.run(sockets=[self._listening])

    async def on_tick(self, counter: int) -> bool:
        now, before = time.monotonic(), self._waiting
        self._waiting = {}
        for connection in list(self.server_state.connections):
            if (state := _awaited(connection)) is None:
                continue
            known = before.get(connection)
            self._waiting[connection] = known if known and known[0] == state else (state, now)
            if now - self._waiting[connection][1] > PATIENCE:
                connection.transport.abort()
        return await super().on_tick(counter)


def _awaited(connection: Any) -> tuple[Any, int] | None:
    """The state in which a connection of uvicorn waits for its client: to read an answer, or to send a request.

    None while a request is being answered; `guard` bounds the time of its body."""
    unread, cycle = connection.transport.get_write_buffer_size(), connection.cycle
    waits = unread or cycle is None or cycle.response_complete
    return (cycle, unread) if waits else None


@contextmanager
def api_server(cascade: Cascade, model: str, options: ServeOptions, say: Say = ignored) -> Iterator[ApiServer]:
    """A server of `cascade`, which callers know as `model`. `say` is called with a line for each request.

    Example: `with api_server(cascade, "example", ServeOptions()) as server: server.serve_forever()`

    Raises UsageError when it cannot listen at `options.host` and `options.port`."""
    metrics = Metrics()
    queue = ImageQueue(cascade, options.queue, options.together, metrics)
    api = ImagesApi(cascade, model, queue, metrics, log_prompts=options.log_prompts, sign=options.sign)
    routes = api.routes()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        to_thread.current_default_thread_limiter().total_tokens = THREADS
        with queue:
            yield

    app = Starlette(
        routes=routes, lifespan=lifespan, exception_handlers=dict.fromkeys((*EXPECTED, ApiError, Exception), _failed)
    )
    paths = [route.path for route in routes if "{" not in route.path] + ["/v1/files"]
    guard = Guard(
        app,
        metrics=metrics,
        names=own_names(options.host),
        key=options.key,
        routes=paths,
        forms=[EDITS],
        free=[*OPEN, METRICS] if options.open_metrics else OPEN,
        say=say,
    )
    config = uvicorn.Config(
        guard,
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="critical",  # the guard logs requests and errors
        access_log=False,
        server_header=False,
        backlog=MAX_BACKLOG,
        limit_concurrency=MAX_CONNECTIONS,
        h11_max_incomplete_event_size=MAX_HEAD,
        timeout_graceful_shutdown=options.patience,
    )
    with _listening(options.host, options.port) as place:
        yield ApiServer(config, place)


def _listening(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=address_family(host), backlog=MAX_BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:
        raise cannot_listen(host, port, error) from error
