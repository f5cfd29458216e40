"""A log of JSON lines; the lines written before a crash stay readable."""

import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ...schemas.errors import CascadeError, UsageError
from ...schemas.json_text import dump_json, load_object


class BatchLog:
    """The log of a batch: one JSON object a line, on disk when `write` returns. A context manager."""

    def __init__(self, path: Path) -> None:
        """Open the log at `path` to append to it, or begin it. Raises UsageError when it cannot be written."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            end = os.fstat(self._descriptor).st_size
            # A killed run may have left half a line; the next line must not continue it.
            self._cut = end > 0 and os.pread(self._descriptor, 1, end - 1) != b"\n"
        except OSError as error:
            raise UsageError(
                f"{path}: the log cannot be written: {error.strerror}; choose another file as log=..."
            ) from error

    def write(self, event: str, *fields: Mapping[str, Any]) -> None:
        """Append an event for each of `fields` and bring it to disk. Raises CascadeError when that fails."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        lines = [dump_json({"time": now, "event": event, **each}) + "\n" for each in fields]
        left = (("\n" if self._cut else "") + "".join(lines)).encode()
        try:
            while left:
                self._cut = True  # until the whole line is written
                left = left[os.write(self._descriptor, left) :]
            os.fsync(self._descriptor)
        except OSError as error:
            raise CascadeError(
                f"{self.path}: the log cannot be written: {error.strerror}; make room, then run the same command again"
            ) from error
        self._cut = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._descriptor)


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a log, in order, without incomplete lines. A missing log has no events.

    Raises UsageError when it cannot be read."""
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise UsageError(f"{path}: the log cannot be read: {error.strerror}; choose another file as log=...") from error
    for line in lines:
        try:
            event = load_object(line)
        except ValueError:
            continue
        yield event
