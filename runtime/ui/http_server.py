"""A small HTTP server for one page: a table of routes, and the checks of every request.

The server is for a browser on a machine that its user trusts: nobody logs in. Three checks keep out other web sites
that the browser shows.

* The Host of a request must be an address or a name of the server; a rebound DNS name is neither.
* The Origin of a POST must be the page itself.
* The type of a POST must be one that a form of another site cannot send.

Every connection has a thread, so a slow client delays no other. The number of connections, the bytes of all bodies in
memory, and the time until a request has arrived are bounded.
"""

import http.client
import re
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import BoundedSemaphore, Lock
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from ...schemas.errors import CascadeError
from ...schemas.limits import MAX_BACKLOG, MAX_BODIES, MAX_CONNECTIONS, MAX_FIELDS, MAX_HEAD
from ..server_address import address_family, cannot_listen, is_for_server, is_other_site, own_names, server_url
from .http_messages import Call, RefusedError, Reply, Route, json_reply

PATIENCE = 60  # seconds until a request has arrived as a whole, and between two of one connection
DRAINED = 64 << 20  # bytes of a refused body that are read all the same, so that the client gets the reply
LINGER = 2  # seconds for reading all of them
CHUNK = 1 << 16

HEADERS: Mapping[str, str] = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}
CLOSED = "default-src 'none'; frame-ancestors 'none'; sandbox"  # for every reply but the page


BUSY = json_reply({"error": "too many connections; try again in a moment"}, HTTPStatus.SERVICE_UNAVAILABLE)


class PageServer(ThreadingHTTPServer):
    """Serves `routes`, whose functions are given `app`. `name` is the host it was asked to listen on."""

    daemon_threads = True  # a watcher of events must not keep the program from ending
    request_queue_size = MAX_BACKLOG

    def __init__(self, host: str, port: int, routes: Sequence[Route], app: Any) -> None:
        """Raises UsageError when it cannot listen there."""
        self.address_family = address_family(host)
        self.routes, self.app = routes, app
        self.names = own_names(host)
        self._places = BoundedSemaphore(MAX_CONNECTIONS)
        self._lock = Lock()  # held while one of the next two attributes changes
        self._held = 0  # bytes of all bodies in memory
        self._expected: dict[socket.socket, float] = {}  # the time by which the request of a connection must arrive
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError, UnicodeError) as error:
            raise cannot_listen(host, port, error) from error

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return server_url(str(host), port)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own, unless there are MAX_CONNECTIONS already."""
        if not self._places.acquire(blocking=False):
            self._refuse(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # the system has no more threads
            self._places.release()
            self._refuse(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.arrived(request)
            self._places.release()

    def _refuse(self, request: socket.socket) -> None:
        """Reply that there are too many connections, unless sending would block.

        The request is read first, as closing a connection with unread bytes would lose the reply."""
        assert isinstance(BUSY.body, bytes)
        head = f"HTTP/1.1 {BUSY.status.value} {BUSY.status.phrase}\r\nContent-Type: {BUSY.type}\r\n"
        head += f"Content-Length: {len(BUSY.body)}\r\nConnection: close\r\n\r\n"
        with suppress(OSError):
            request.setblocking(False)
            request.send(head.encode() + BUSY.body)
            request.recv(MAX_HEAD)
        self.shutdown_request(request)

    def expect(self, request: socket.socket) -> None:
        """Start the clock of a connection: its next request has to arrive within PATIENCE seconds."""
        with self._lock:
            self._expected[request] = time.monotonic() + PATIENCE

    def arrived(self, request: socket.socket) -> None:
        with self._lock:
            self._expected.pop(request, None)

    def service_actions(self) -> None:
        """Close the connections of clients that take too long to send a request. Called several times a second."""
        now = time.monotonic()
        with self._lock:
            late = [request for request, until in self._expected.items() if until < now]
        for request in late:
            with suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)  # its thread reads the end of the stream

    @contextmanager
    def room_for(self, length: int) -> Iterator[None]:
        """Reserve memory for a body. Raises RefusedError when other bodies have taken it."""
        with self._lock:
            if self._held + length > MAX_BODIES:
                raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "too much at the same time; try again in a moment")
            self._held += length
        try:
            yield
        finally:
            with self._lock:
                self._held -= length

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the traceback of an error, unless the client is gone."""
        if not isinstance(sys.exception(), OSError):
            traceback.print_exc()


class _Head:
    """A stream of the request line and the headers, which ends after MAX_HEAD bytes."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._left = stream, MAX_HEAD
        self.read1 = stream.read1  # for the rest of a refused body, which is no header

    def readline(self, size: int) -> bytes:
        line: bytes = self._stream.readline(min(size, self._left + 1))
        self._left -= len(line)
        if self._left < 0:
            raise http.client.LineTooLong("header")
        return line


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    raw_requestline: bytes  # set by the base class
    protocol_version = "HTTP/1.1"
    timeout = PATIENCE

    def handle_one_request(self) -> None:
        self.server.expect(self.connection)
        super().handle_one_request()

    def parse_request(self) -> bool:
        """Parse as the base class does, but bound all headers together, and refuse HTTP/0.9, which has no headers."""
        if len(self.raw_requestline.split()) == 2:
            self.send_error(HTTPStatus.BAD_REQUEST)
            return False
        stream, self.rfile = self.rfile, _Head(self.rfile)  # type: ignore[assignment]
        try:
            return super().parse_request()
        finally:
            self.rfile = stream

    def do_GET(self) -> None:
        try:
            reply = self._reply()
        except RefusedError as refusal:
            reply = json_reply({"error": str(refusal)}, refusal.status)
        except CascadeError as error:
            reply = json_reply({"error": str(error)}, HTTPStatus.BAD_REQUEST)
        except (ConnectionError, TimeoutError):
            raise  # the client is gone
        except Exception as error:
            traceback.print_exc()
            message = f"an unexpected error ({type(error).__name__}); see the terminal"
            reply = json_reply({"error": message}, HTTPStatus.INTERNAL_SERVER_ERROR)
        self._send(reply)

    do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = do_OPTIONS = do_GET  # noqa: N815  # refused by the table

    def _reply(self) -> Reply:
        self._unread = self._length()
        self._require_ours()
        route, groups, query = self._find()
        if self.command != "POST":
            self.server.arrived(self.connection)
            return route.answer(self.server.app, Call(groups, query, dict(self.headers.items())))
        self._require_type(route)
        self._require_size(route.limit)
        with self.server.room_for(self._unread):
            body = self._body()
            self.server.arrived(self.connection)
            return route.answer(self.server.app, Call(groups, query, dict(self.headers.items()), body))

    def _length(self) -> int:
        """The length of the body that the client announces."""
        self._unread = DRAINED  # for all that is known so far
        if "Transfer-Encoding" in self.headers:
            raise RefusedError(HTTPStatus.LENGTH_REQUIRED, "expected a body with a Content-Length")
        lengths = {length.strip() for length in self.headers.get_all("Content-Length", ["0"])}
        if len(lengths) != 1 or not re.fullmatch(r"[0-9]{1,18}", length := lengths.pop()):
            raise RefusedError(HTTPStatus.BAD_REQUEST, "Content-Length: expected a number")
        return int(length)

    def _require_ours(self) -> None:
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not is_for_server(hosts[0], self.server.names):
            raise RefusedError(HTTPStatus.FORBIDDEN, "unknown host; open the page by its address or as localhost")
        if self.command != "GET" and is_other_site(self.headers.get("Origin"), hosts[0]):
            raise RefusedError(HTTPStatus.FORBIDDEN, "requests from other web sites are refused")

    def _find(self) -> tuple[Route, dict[str, str], dict[str, str]]:
        try:
            parts = urlsplit(self.path)
            query = {name: values[-1] for name, values in parse_qs(parts.query, max_num_fields=MAX_FIELDS).items()}
        except ValueError:
            raise RefusedError(HTTPStatus.BAD_REQUEST, "not an address of this server") from None
        path = unquote(parts.path, errors="surrogateescape")  # as names of files are in Python
        found = [(route, match) for route in self.server.routes if (match := re.fullmatch(route.pattern, path))]
        if not found:
            raise RefusedError(HTTPStatus.NOT_FOUND, "there is nothing here")
        for route, match in found:
            if route.method == self.command:
                return route, match.groupdict(), query
        raise RefusedError(HTTPStatus.METHOD_NOT_ALLOWED, f"expected {' or '.join(route.method for route, _ in found)}")

    def _require_type(self, route: Route) -> None:
        """Refuse other types of bodies: a form of another site needs no permission, and cannot send these types."""
        if route.types and not self.headers.get("Content-Type", "").lower().startswith(route.types):
            raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"expected a body of type {' or '.join(route.types)}")

    def _require_size(self, limit: int) -> None:
        if self._unread > limit:
            limits = f"{limit >> 20} MB" if limit >= 1 << 20 else f"{limit >> 10} kB"
            raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"too large: expected at most {limits}")

    def _body(self) -> bytes:
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
        length = len(reply.body) if isinstance(reply.body, bytes) else reply.length
        if length is not None:
            sent["Content-Length"] = str(length)
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
        """Read the rest of what a refused client sends: closing a connection with unread bytes would lose the reply."""
        if not self._unread:
            return
        left, until = min(self._unread, DRAINED), time.monotonic() + LINGER
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while left and (patience := until - time.monotonic()) > 0:
                self.connection.settimeout(patience)
                read = self.rfile.read1(min(left, CHUNK))
                if not read:
                    break
                left -= len(read)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse what the base class cannot parse as HTTP, with a reply in the form of all other refusals."""
        self._unread, self.close_connection = DRAINED, True
        self.request_version, self.requestline = self.protocol_version, ""  # without them there is no status line
        self.command = getattr(self, "command", None) or "GET"
        self._send(json_reply({"error": "not a request this server understands"}, HTTPStatus(code)))

    def version_string(self) -> str:
        return "cascadekit"

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the terminal shows images and errors."""
