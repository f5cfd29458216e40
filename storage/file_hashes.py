"""Compares files with their entries in a manifest: by size and time, by samples of the content, or by every byte."""

import hashlib
import os
import struct
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Self

from ..schemas.errors import CheckpointError
from ..schemas.limits import MAX_HEADER_BYTES
from .open_file import opened

if TYPE_CHECKING:
    from ..schemas.manifest import FileEntry  # which takes 0.2 s to import

SAMPLES = 64
SAMPLE_BYTES = 1 << 16
WHOLE_BELOW = 1 << 26  # bytes; a smaller file is hashed whole in 50 ms
SHOWN_DIGITS = 12  # of a digest, in messages
HASH_THREADS = 2  # one stream has 1 to 2 GB/s, a disk seldom more than two of them
HASH_BLOCK = 1 << 22


def fingerprint(path: Path) -> str:
    """Return a SHA-256, in hexadecimal, of the size, the header of a safetensors file, and samples of the content.

    There are 64 evenly spaced samples of 64 KiB; a file that is no larger is read whole. This takes milliseconds at any
    size. Other weights differ nearly everywhere, so their fingerprint differs. A few bytes that changed between two
    samples do not show. Raises CheckpointError when the file cannot be read."""
    digest = hashlib.sha256()
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(struct.pack("<Q", size))
        for start, stop in _sampled(size, _header_end(os.pread(file.fileno(), 9, 0), size)):
            digest.update(os.pread(file.fileno(), stop - start, start))
    return digest.hexdigest()


def header_sha256(path: Path) -> str | None:
    """Return the SHA-256 of a safetensors file's header; None for any other file."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        end = _header_end(os.pread(file.fileno(), 9, 0), size)
        return hashlib.sha256(os.pread(file.fileno(), end, 0)).hexdigest() if end else None


def _header_end(first: bytes, size: int) -> int:
    """Return where the tensors of a safetensors file begin; 0 for any other file."""
    if len(first) < 9 or first[8:] not in b"{ \t\r\n":
        return 0
    length = int(struct.unpack("<Q", first[:8])[0])
    return 8 + length if length <= MAX_HEADER_BYTES and 8 + length <= size else 0


def _sampled(size: int, start: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges that the fingerprint covers: the header, then samples from the next byte to the last."""
    yield 0, start
    if size - start <= SAMPLES * SAMPLE_BYTES:
        yield start, size
        return
    for number in range(SAMPLES):
        at = start + (size - start - SAMPLE_BYTES) * number // (SAMPLES - 1)
        yield at, at + SAMPLE_BYTES


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of the whole file, in hexadecimal. Raises CheckpointError when it cannot be read."""
    with opened(path) as file:
        return _sha256(file)


def sha256_unless_changed(path: Path) -> str:
    """Return the same, but read the file again only when its size or time has changed. Raises OSError."""
    status = path.stat()
    return _sha256_then(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _sha256_then(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return _sha256(file)


def _sha256(file: BufferedReader) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def describe_file(root: Path, path: Path, sha256: str | None) -> "FileEntry":
    """Return the manifest's entry of a file at `path` in the bundle at `root`. Raises CheckpointError if it is gone."""
    from ..schemas.manifest import FileEntry

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


def find_change(path: Path, entry: "FileEntry", *, always_hash: bool = False) -> str | None:
    """Return how the file at `path` differs from `entry`: the expected and the found value. None when it does not.

    A missing file and another size are differences. Otherwise:

    | size and time | `always_hash` | compared |
    |---|---|---|
    | as in the entry | no | nothing more: the file is trusted |
    | another time | no | the SHA-256 below 64 MiB where the entry has one, else the fingerprint |
    | any time | yes | the SHA-256 where the entry has one, else the fingerprint |

    The fingerprint reads samples only, so a change between two samples of a file without SHA-256 is not found."""
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
    """Hashes files in the background: `start` begins with a file, `of` waits for its hash.

    Leaving the block stops unfinished work."""

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
        """Wait for the file's SHA-256; None if it was not started. Raises CheckpointError when it cannot be read."""
        return self._found[path].result() if path in self._found else None

    def _hash(self, path: Path) -> str:
        digest, block = hashlib.sha256(), bytearray(HASH_BLOCK)
        with opened(path) as file:
            while (size := file.readinto(block)) and not self._stopped.is_set():
                digest.update(memoryview(block)[:size])
        return digest.hexdigest()
