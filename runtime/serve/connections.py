"""Ends the connections of clients that keep the server waiting: few are open at the same time."""

from collections.abc import Collection
from typing import Any

from .guard import PATIENCE


class SilentConnections:
    """Remembers since when each connection of uvicorn waits for its client, in the same state."""

    def __init__(self) -> None:
        self._since: dict[Any, tuple[Any, float]] = {}

    def end(self, connections: Collection[Any], now: float) -> None:
        """End every one of `connections` that has waited for `PATIENCE` seconds. `now` is the time in seconds."""
        since = {}
        for connection in list(connections):
            if (state := _awaited(connection)) is None:
                continue
            before = self._since.get(connection)
            since[connection] = before if before and before[0] == state else (state, now)
            if now - since[connection][1] > PATIENCE:
                connection.transport.abort()
        self._since = since


def _awaited(connection: Any) -> tuple[Any, int] | None:
    """The state in which a connection waits for its client: to read an answer, or to send a request.

    None while a request is being answered; `guard` bounds the time of its body."""
    unread, cycle = connection.transport.get_write_buffer_size(), connection.cycle
    waits = unread or cycle is None or cycle.response_complete
    return (cycle, unread) if waits else None
