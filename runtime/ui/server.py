"""A small HTTP server for one page: routes as a table, and what every request and reply must satisfy.

Only for a browser on a machine its user trusts: nobody logs in. Other web sites that this browser shows are kept out:
the Host of a request must be an address or a name the server knows (a rebound DNS name is neither), the Origin of a
POST must be the page itself, and its type one that a form of another site cannot send.
"""

import ipaddress
import json
import re
import socket
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from ...schemas.errors import CascadeError, UsageError

PATIENCE = 60  # seconds a client may take to send what it announced
DRAINED = 64 << 20  # bytes of a refused body that are read all the same, so that the client hears of the refusal
LINGER = 2  # seconds without any of them, after which nobody listens
CHUNK = 1 << 16

HEADERS: Mapping[str, str] = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}
CLOSED = "default-src 'none'; frame-ancestors 'none'; sandbox"  # for whatever is not the page


class RefusedError(Exception):
    """A request that is answered with an error and a sentence."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Reply:
    """A body as a whole, or in pieces that are sent as they come."""

    body: bytes | Iterable[bytes]
    type: str
    status: HTTPStatus = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict)


def json_reply(value: Any, status: HTTPStatus = HTTPStatus.OK) -> Reply:
    return Reply(json.dumps(value).encode(), "application/json", status)


@dataclass(frozen=True)
class Call:
    """A request: the groups of its route, its query, and its body of the types and size that the route takes."""

    groups: Mapping[str, str]
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = b""

    def json(self) -> dict[str, Any]:
        """The body, an object. Raises RefusedError for anything else, numbers that JSON does not have included."""
        try:
            value = json.loads(self.body, parse_constant=_no_number)
        except (ValueError, RecursionError):
            raise RefusedError(HTTPStatus.BAD_REQUEST, "the body is not JSON") from None
        if not isinstance(value, dict):
            raise RefusedError(HTTPStatus.BAD_REQUEST, "the body is not a JSON object")
        return value


@dataclass(frozen=True)
class Route:
    """`pattern` matches a whole path; a POST takes bodies of at most `limit` bytes whose type starts with one of
    `types`."""

    method: str
    pattern: str
    answer: Callable[[Any, Call], Reply]
    limit: int = 0
    types: tuple[str, ...] = ()


class PageServer(ThreadingHTTPServer):
    """Serves `routes`, whose functions are given `app`. `name` is the host it was asked to listen on."""

    daemon_threads = True  # a watcher of events must not keep the program from ending

    def __init__(self, host: str, port: int, routes: Sequence[Route], app: Any) -> None:
        """Raises UsageError when it cannot listen there."""
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.routes, self.app = routes, app
        self.names = {"localhost", host.lower(), socket.gethostname().lower()}
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UsageError(f"{host}, port {port}: cannot listen there: {reason}; give another --port") from error

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://[{host!s}]:{port}" if ":" in str(host) else f"http://{host!s}:{port}"

    def knows(self, host: str) -> bool:
        """Whether a Host header names this server: by an address, or by a name that is its own."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self.names or _is_address(name)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave are nothing to tell of."""
        if not isinstance(sys.exception(), OSError):
            traceback.print_exc()


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    timeout = PATIENCE

    def do_GET(self) -> None:
        try:
            reply = self._reply()
        except RefusedError as refusal:
            reply = json_reply({"error": str(refusal)}, refusal.status)
        except CascadeError as error:
            reply = json_reply({"error": str(error)}, HTTPStatus.BAD_REQUEST)
        except (ConnectionError, TimeoutError):
            raise  # nobody is there to be told
        except Exception as error:
            traceback.print_exc()
            message = f"something went wrong that should not ({type(error).__name__}); the terminal says more"
            reply = json_reply({"error": message}, HTTPStatus.INTERNAL_SERVER_ERROR)
        self._send(reply)

    do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = do_OPTIONS = do_GET  # noqa: N815  # refused by the table

    def _reply(self) -> Reply:
        self._unread = self._length()
        self._require_ours()
        route, groups, query = self._find()
        body = b""
        if self.command == "POST":
            self._require_type(route)
            body = self._body(route.limit)
        return route.answer(self.server.app, Call(groups, query, dict(self.headers.items()), body))

    def _length(self) -> int:
        """Of the body, as announced."""
        self._unread = DRAINED  # for all that is known so far
        if "Transfer-Encoding" in self.headers:
            raise RefusedError(HTTPStatus.LENGTH_REQUIRED, "expected a body with a Content-Length")
        length = self.headers.get("Content-Length", "0")
        if not re.fullmatch(r"\d{1,18}", length):
            raise RefusedError(HTTPStatus.BAD_REQUEST, "Content-Length: expected a number")
        return int(length)

    def _require_ours(self) -> None:
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not self.server.knows(hosts[0]):
            raise RefusedError(HTTPStatus.FORBIDDEN, "this server goes by its address or localhost, by no other name")
        origin = self.headers.get("Origin")
        if self.command != "GET" and origin is not None and origin.partition("://")[2].lower() != hosts[0].lower():
            raise RefusedError(HTTPStatus.FORBIDDEN, "requests of other web sites are refused")

    def _find(self) -> tuple[Route, dict[str, str], dict[str, str]]:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        found = [(route, match) for route in self.server.routes if (match := re.fullmatch(route.pattern, path))]
        if not found:
            raise RefusedError(HTTPStatus.NOT_FOUND, "there is nothing here")
        for route, match in found:
            if route.method == self.command:
                query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
                return route, match.groupdict(), query
        raise RefusedError(HTTPStatus.METHOD_NOT_ALLOWED, f"expected {' or '.join(route.method for route, _ in found)}")

    def _require_type(self, route: Route) -> None:
        """Forms, which other sites may send without asking, have none of these types."""
        if route.types and not self.headers.get("Content-Type", "").lower().startswith(route.types):
            raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"expected a body of type {' or '.join(route.types)}")

    def _body(self, limit: int) -> bytes:
        if self._unread > limit:
            limits = f"{limit >> 20} MB" if limit >= 1 << 20 else f"{limit >> 10} kB"
            raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"too large: expected at most {limits}")
        body = self.rfile.read(self._unread)
        if len(body) < self._unread:
            raise ConnectionError("the client left")
        self._unread = 0
        return body

    def _send(self, reply: Reply) -> None:
        whole = isinstance(reply.body, bytes)
        self.close_connection |= not whole or self._unread > 0
        self.send_response(reply.status)
        sent = {**HEADERS, "Content-Security-Policy": CLOSED, "Cache-Control": "no-store", **reply.headers}
        sent["Content-Type"] = reply.type
        if isinstance(reply.body, bytes):
            sent["Content-Length"] = str(len(reply.body))
        if self.close_connection:
            sent["Connection"] = "close"
        for name, value in sent.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            for piece in [reply.body] if isinstance(reply.body, bytes) else reply.body:
                self.wfile.write(piece)
        self._drain()

    def _drain(self) -> None:
        """Read what a refused client goes on sending: a connection closed on unread bytes loses the reply."""
        if not self._unread:
            return
        left = min(self._unread, DRAINED)
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(LINGER)
            while left and (read := self.rfile.read(min(left, CHUNK))):
                left -= len(read)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses, requests that are no HTTP, in the form of all other refusals."""
        self._unread, self.close_connection = 0, True
        self.command = getattr(self, "command", None) or "GET"
        self._send(json_reply({"error": "not a request this server understands"}, HTTPStatus(code)))

    def version_string(self) -> str:
        return "cascadekit"

    def log_message(self, format: str, *args: Any) -> None:
        """The terminal is for images and errors."""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _no_number(name: str) -> Any:
    raise ValueError(name)
