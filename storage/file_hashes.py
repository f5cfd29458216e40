"""Whether a file is the one that was written down: by size and time, by samples of its content, or by all of it."""

import hashlib
import os
import struct
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from threading import Event
from typing import Self

from ..schemas.bundle import FileEntry
from ..schemas.errors import CheckpointError
from ..schemas.limits import MAX_HEADER_BYTES
from .open_file import opened

SAMPLES = 64
SAMPLE_BYTES = 1 << 16
WHOLE_BELOW = 1 << 26  # bytes; what is smaller is hashed whole in no time
SHOWN_DIGITS = 12  # of a digest, in messages
HASH_THREADS = 2  # one stream has 1 to 2 GB/s, a disk seldom more than two of them
HASH_BLOCK = 1 << 22


def fingerprint(path: Path) -> str:
    """SHA-256, in hexadecimal, over the size, a safetensors file's header, and 64 evenly spaced samples of 64 KiB;
    over all of a file that is no larger than those. Takes milliseconds at any size.

    It tells weights from other weights, as those differ nearly everywhere; a few bytes changed between two samples
    it does not see. Raises CheckpointError when the file cannot be read."""
    digest = hashlib.sha256()
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(struct.pack("<Q", size))
        for start, stop in _sampled(size, _header_end(os.pread(file.fileno(), 9, 0), size)):
            digest.update(os.pread(file.fileno(), stop - start, start))
    return digest.hexdigest()


def _header_end(first: bytes, size: int) -> int:
    """Where the tensors of a safetensors file begin; 0 in any other. It begins with a length, then JSON."""
    if len(first) < 9 or first[8:] not in b"{ \t\r\n":
        return 0
    length = int(struct.unpack("<Q", first[:8])[0])
    return 8 + length if length <= MAX_HEADER_BYTES and 8 + length <= size else 0


def _sampled(size: int, start: int) -> Iterator[tuple[int, int]]:
    """The ranges that the fingerprint reads: the header, then samples from the first byte after it to the last."""
    yield 0, start
    if size - start <= SAMPLES * SAMPLE_BYTES:
        yield start, size
        return
    for number in range(SAMPLES):
        at = start + (size - start - SAMPLE_BYTES) * number // (SAMPLES - 1)
        yield at, at + SAMPLE_BYTES


def sha256_of(path: Path) -> str:
    """SHA-256 of the whole file, in hexadecimal. Raises CheckpointError when it cannot be read."""
    with opened(path) as file:
        return _sha256(file)


def sha256_unless_changed(path: Path) -> str:
    """The same, read once as long as size and time of the file stay what they are. Raises OSError."""
    status = path.stat()
    return _sha256_then(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _sha256_then(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return _sha256(file)


def _sha256(file: BufferedReader) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def describe_file(root: Path, path: Path, sha256: str | None) -> FileEntry:
    """What a manifest says of the file at `path` in the bundle at `root`. Raises CheckpointError when it is gone."""
    status = _status(path)
    if status is None:
        raise CheckpointError(f"{path}: no such file")
    return FileEntry(
        path=path.relative_to(root).as_posix(),
        bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        fingerprint=fingerprint(path),
        sha256=sha256,
    )


def find_change(path: Path, entry: FileEntry, *, always_hash: bool = False) -> str | None:
    """How the file at `path` differs from `entry`: what was expected and what was found. None when it does not.

    A file of the same size and time of change is trusted, whatever its bytes. Of another time, it must have the same
    content: all of it below 64 MiB where the manifest has its SHA-256, else the same fingerprint. `always_hash` reads
    the file whatever its time: all of it where the manifest has its SHA-256, else the samples of its fingerprint."""
    status = _status(path)
    if status is None or status.st_size != entry.bytes:
        found = f"it has {status.st_size}" if status else "it is missing"
        return f"expected {entry.bytes} bytes, {found}"
    if not always_hash and status.st_mtime_ns == entry.mtime_ns:
        return None
    if entry.sha256 is not None and (always_hash or entry.bytes < WHOLE_BELOW):
        return _differs("SHA-256", entry.sha256, sha256_of(path))
    return _differs("fingerprint", entry.fingerprint, fingerprint(path))


def _status(path: Path) -> os.stat_result | None:
    return path.stat() if path.is_file() else None


def _differs(what: str, expected: str, found: str) -> str | None:
    if found == expected:
        return None
    return f"expected {what} {expected[:SHOWN_DIGITS]}..., found {found[:SHOWN_DIGITS]}...: changed since the export"


class Hashing:
    """Hashes files in the background: `start` each, and ask for it with `of` at the end. Leaving the block stops what
    has not ended."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(HASH_THREADS)
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
        digest, block = hashlib.sha256(), bytearray(HASH_BLOCK)
        with opened(path) as file:
            while (size := file.readinto(block)) and not self._stopped.is_set():
                digest.update(memoryview(block)[:size])
        return digest.hexdigest()
