"""SHA-256 of a file that is being written, in a thread that reads behind the writer."""

import hashlib
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Condition

from ..schemas.errors import ConversionError
from .safetensors_file import Progress

BLOCK = 1 << 20


class HashBehind:
    """Follows a safetensors file that grows from its front; what it reads lies in the page cache still.

    Of the tensors' bytes, the first `in_order` are written one after another; the rest is read at the end."""

    def __init__(self, path: Path, in_order: int) -> None:
        self._path = path
        self._in_order = in_order
        self._digest = hashlib.sha256()
        self._buffer = memoryview(bytearray(BLOCK))
        self._state = Condition()
        self._written = 0  # of the tensors' bytes
        self._ended = False
        self._failed = False

    def progress(self, also: Progress | None) -> Progress:
        """What the writer is to call with each number of bytes written; it tells `also` too."""

        def advance(done: int) -> None:
            with self._state:
                self._written += done
                self._state.notify()
            if also:
                also(done)

        return advance

    @property
    def sha256(self) -> str:
        """Of the whole file, once the writing has ended well."""
        return self._digest.hexdigest()

    def end(self, *, failed: bool) -> None:
        with self._state:
            self._ended, self._failed = True, failed
            self._state.notify()

    def follow(self) -> None:
        """Read until the writer has ended."""
        if not self._wait(0):
            return
        with io.FileIO(self._path) as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            file.seek(0)
            while self._wait(file.tell() - start) and self._read(file, start):
                pass

    def _wait(self, hashed: int) -> bool:
        """Wait for more than `hashed` bytes of tensors, or the end. False when there is nothing more to do."""
        with self._state:
            self._state.wait_for(lambda: self._ended or min(self._written, self._in_order) > hashed)
            return not self._failed

    def _read(self, file: io.FileIO, start: int) -> bool:
        """Hash what has been written so far. False at the end of a file that is complete."""
        with self._state:
            whole, stop = self._ended, start + min(self._written, self._in_order)
        while whole or file.tell() < stop:
            wanted = BLOCK if whole else min(BLOCK, stop - file.tell())
            count = file.readinto(self._buffer[:wanted])
            if not count:
                return False
            self._digest.update(self._buffer[:count])
        return True


@contextmanager
def hashed_behind(path: Path, in_order: int) -> Iterator[HashBehind]:
    """Inside, a thread hashes the file at `path` while it is written; at the end it has hashed all of it.

    Raises ConversionError when what was written cannot be read again."""
    behind = HashBehind(path, in_order)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(behind.follow)
        failed = True
        try:
            yield behind
            failed = False
        finally:
            behind.end(failed=failed)
        try:
            reading.result()
        except OSError as error:
            raise ConversionError(f"{path}: cannot be read again: {error.strerror}") from error
