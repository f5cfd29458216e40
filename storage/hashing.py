"""SHA-256 of files that other threads read while the work goes on."""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Self

from ..schemas.errors import CheckpointError
from .fingerprints import require_regular

THREADS = 2  # one stream has 1 to 2 GB/s, a disk seldom more than two of them
BLOCK = 1 << 22


class Hashing:
    """Hashes files in the background: `start` each, and ask for it with `of` at the end. Leaving the block stops what
    has not ended."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS)
        self._stopped = Event()
        self._found: dict[Path, Future[str]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    def start(self, path: Path) -> None:
        """Begin with the file at `path`, whose content does not change any more."""
        self._found[path] = self._pool.submit(self._hash, path)

    def of(self, path: Path) -> str | None:
        """Its SHA-256, waited for; None for one that was not started. Raises CheckpointError when it cannot be read."""
        return self._found[path].result() if path in self._found else None

    def _hash(self, path: Path) -> str:
        require_regular(path)
        digest, block = hashlib.sha256(), bytearray(BLOCK)
        try:
            with path.open("rb", buffering=0) as file:
                while (size := file.readinto(block)) and not self._stopped.is_set():
                    digest.update(memoryview(block)[:size])
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        return digest.hexdigest()
