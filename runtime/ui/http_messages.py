"""The routes of the page's server, the requests it accepts, and its replies."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from ...schemas.json_text import load_object


class RefusedError(Exception):
    """A request that is refused with a status and a message."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Reply:
    """A reply. `body` is whole, or in pieces that are sent as they come; `length` is their size in bytes if known."""

    body: bytes | Iterable[bytes]
    type: str
    status: HTTPStatus = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict)
    length: int | None = None


def json_reply(value: Any, status: HTTPStatus = HTTPStatus.OK) -> Reply:
    """A reply in JSON. Raises ValueError for NaN and infinity, which no browser would read."""
    return Reply(json.dumps(value, allow_nan=False).encode(), "application/json", status)


@dataclass(frozen=True)
class Call:
    """A request that its route accepts: the groups of the route's pattern, the query, the headers and the body."""

    groups: Mapping[str, str]
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = b""

    def json(self) -> dict[str, Any]:
        """The body as a JSON object. Raises RefusedError for any other body, and for NaN and infinity."""
        try:
            return load_object(self.body, strict=True)
        except ValueError:
            raise RefusedError(HTTPStatus.BAD_REQUEST, "the body is not a JSON object") from None


@dataclass(frozen=True)
class Route:
    """`pattern` matches a whole path; a POST takes bodies of at most `limit` bytes whose type starts with one of
    `types`."""

    method: str
    pattern: str
    answer: Callable[[Any, Call], Reply]
    limit: int = 0
    types: tuple[str, ...] = ()
