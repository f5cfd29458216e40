"""Checks every request before its route sees it, bounds its body, and records how it was answered.

Without an API key the server is for one machine; `runtime/server_address.py` says which requests it then answers.
"""

import asyncio
import hmac
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...schemas.callbacks import Say
from ...schemas.errors import CascadeError
from ..server_address import is_for_server, is_other_site
from .image_queue import QueueFullError
from .metrics import Metrics

PATIENCE = 60  # seconds until the body has arrived
MOST_BODY, MOST_JSON = 64 << 20, 1 << 20  # bytes of a form, which is kept on disk, and of any other body
OPEN = ("/health", "/v1/files/")  # need no key: probes have none, and files have names that nobody guesses
DESCRIBED = "cascadekit"  # key of the scope under which a route leaves words for the log
LEFT = 499  # the status that the log shows when the client left before the answer, as nginx does


# Errors of routes that are no reason for a traceback.
EXPECTED = (ClientDisconnect, ConnectionError, HTTPException, QueueFullError, CascadeError)


class ApiError(Exception):
    """A request that is refused, with a status and the fields of OpenAI's error."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def error_reply(status: int, message: str, code: str | None = None, seconds: int | None = None) -> JSONResponse:
    """An error as OpenAI's clients read it; `seconds` until the call may be repeated."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status, {} if seconds is None else {"Retry-After": str(seconds)})


@dataclass
class Guard:
    """An ASGI application around another one, for a server that is known by `names`.

    `routes` are the paths that metrics name. Those in `forms` take large bodies. Paths that begin like one of `free`
    need no `key`. `say` is called with a line for each request."""

    app: ASGIApp
    metrics: Metrics
    names: frozenset[str]
    key: str | None
    routes: Sequence[str]
    forms: Sequence[str]
    free: Sequence[str]
    say: Say

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), LEFT
        most = MOST_BODY if scope["path"] in self.forms else MOST_JSON

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._require_allowed(scope)
            await self.app(scope, _Body(receive, Headers(scope=scope), most), sending)
        except Exception as error:
            if status == LEFT:  # otherwise the application has answered, and reported the error
                await reply_to(error)(scope, receive, sending)
        finally:
            self._record(scope, status, time.monotonic() - began)

    def _require_allowed(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if scope["path"].startswith(tuple(self.free)):
            return
        if self.key is not None:
            given = headers.get("Authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode("latin-1"), self.key.encode()):
                raise ApiError(
                    401, "the API key is missing or wrong; send it as Authorization: Bearer KEY", "invalid_api_key"
                )
            return
        host = headers.get("Host", "")
        if not is_for_server(host, self.names):
            raise ApiError(403, "unknown host; ask by the address or as localhost, or start the server with an API key")
        if is_other_site(headers.get("Origin"), host):
            raise ApiError(403, "requests from other web sites are refused")

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"]
        route = next((route for route in self.routes if path == route or path.startswith(f"{route}/")), "other")
        self.metrics.answered(route, status, seconds)
        if route == "other" or scope["method"] == "POST":
            shown = path[:100].encode("ascii", "backslashreplace").decode()
            self.say(" ".join([scope["method"], shown, str(status), f"{seconds:.2f}s", *scope.get(DESCRIBED, [])]))


class _Body:
    """`receive` with a bound on the body's bytes and on the time until they have arrived."""

    def __init__(self, receive: Receive, headers: Headers, most: int) -> None:
        self._receive, self._most, self._left, self._whole = receive, most, most, False
        self._until = time.monotonic() + PATIENCE
        length = headers.get("Content-Length", "0")
        if length.isdecimal() and int(length[:20]) > most:
            raise self._too_large()

    async def __call__(self) -> Message:
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout(self._until - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(408, f"the request did not arrive within {PATIENCE} s") from None
        self._left -= len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._left < 0:
            raise self._too_large()
        return message

    def _too_large(self) -> ApiError:
        return ApiError(413, f"too large: expected at most {self._most >> 20} MB")


def reply_to(error: Exception) -> Response:
    """The answer to a request that ended in `error`; the traceback of an unexpected one is printed."""
    match error:
        case ApiError():
            return error_reply(error.status, str(error), error.code)
        case HTTPException():
            return error_reply(error.status_code, error.detail)
        case QueueFullError():
            return error_reply(429, str(error), "rate_limit_exceeded", error.seconds)
        case CascadeError():
            return error_reply(400, str(error))
        case ClientDisconnect() | ConnectionError():
            return Response(status_code=LEFT)
    traceback.print_exception(error)
    return error_reply(500, f"an unexpected error ({type(error).__name__}); see the server's terminal")
