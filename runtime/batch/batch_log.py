"""A log of JSON lines; the lines written before a crash stay readable."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, Self

from ...schemas.errors import CascadeError, UsageError
from ...schemas.json_text import dump_json, load_object
from ...storage.bucket import BucketPath

PUT_EVERY = 60.0  # seconds between two puts of a log into a bucket
PUT_SHARE = 20  # at most one part in so many of the time goes into them


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


class BucketLog(BatchLog):
    """The log of a batch in a bucket, which cannot be appended to: a local file that is put there whole, again and
    again. A killed process loses the lines of the last minute or so; the images have all that a second run needs."""

    def __init__(self, place: BucketPath) -> None:
        """Continue the log at `place`, or begin it. Raises CascadeError when the bucket does not give it."""
        self._place, self._due, content = place, 0.0, b""
        with suppress(FileNotFoundError):
            content = place.read_bytes()
        self._folder = Path(tempfile.mkdtemp(prefix="cascadekit-log-"))
        (self._folder / place.name).write_bytes(content)
        super().__init__(self._folder / place.name)

    def write(self, event: str, *fields: Mapping[str, Any]) -> None:
        super().write(event, *fields)
        if (began := monotonic()) >= self._due:
            self._place.put(self.path.read_bytes())
            self._due = monotonic() + max(PUT_EVERY, PUT_SHARE * (monotonic() - began))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        super().__exit__(kind, error, at)
        try:
            self._place.put(self.path.read_bytes())
        except CascadeError:
            if error is None:  # the error that ended the batch says more than one of its log
                raise
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)


def open_log(path: Path) -> BatchLog:
    """The log at `path`, in a folder or a bucket, to append to it."""
    return BucketLog(path) if isinstance(path, BucketPath) else BatchLog(path)


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a log, in order, without incomplete lines. A missing log has no events.

    Raises UsageError when it cannot be read."""
    try:
        lines = path.read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UsageError(f"{path}: the log cannot be read: {error.strerror}; choose another file as log=...") from error
    for line in lines:
        try:
            event = load_object(line)
        except ValueError:
            continue
        yield event
