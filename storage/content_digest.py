"""The digest in a passport: of every byte of the file that holds it.

The digest covers the file with zeros in place of its own digits, so that it can lie inside. It is the SHA-256 of the
CRC-32s of the file's blocks of 1 MiB, 4 bytes each, little endian. A SHA-256 of the bytes themselves would take longer
than copying them. Pieces of 16 blocks are read back in threads while later ones are still being written."""

import hashlib
import mmap
import os
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from ..schemas.errors import CheckpointError
from ..schemas.passport_keys import ALGORITHM, SLOT
from .file_hashes import HASH_THREADS
from .open_file import opened

BLOCK = 1 << 20  # bytes of a CRC-32, and in memory at a time
PIECE = 16 * BLOCK
EMPTY = SLOT.encode()


class PieceDigests:
    """Hashes the pieces of the open file `file` of `end` bytes while it is written, and then fills in the digest.

    The first `start` bytes are written already; they hold SLOT. Leaving the block stops unfinished work."""

    def __init__(self, file: int, start: int, end: int) -> None:
        self._file, self._end = file, end
        self._slot = os.pread(file, start, 0).index(EMPTY)
        self._left = [stop - begin for begin, stop in _pieces(end)]
        self._pool = ThreadPoolExecutor(HASH_THREADS)
        self._found: dict[int, Future[bytes]] = {}
        self.wrote(0, start)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def wrote(self, at: int, nbytes: int) -> None:
        """Note that `nbytes` bytes from byte `at` have their final values, which happens once to each byte."""
        for number in range(at // PIECE, -(-(at + nbytes) // PIECE)):
            begin = number * PIECE
            self._left[number] -= min(at + nbytes, begin + PIECE) - max(at, begin)
            if not self._left[number]:
                self._start(number)

    def fill_in(self) -> None:
        """Write the digest into the file, all of whose other bytes have their final values."""
        for number in range(len(self._left)):
            if number not in self._found:
                self._start(number)
        digest = _combined(self._found[number].result() for number in range(len(self._left)))
        os.pwrite(self._file, digest.encode(), self._slot)

    def _start(self, number: int) -> None:
        begin, stop = number * PIECE, min(self._end, (number + 1) * PIECE)
        self._found[number] = self._pool.submit(_crcs_of_range, self._file, begin, stop)


def fill_in_digest(path: Path) -> None:
    """Replace SLOT, which the file at `path` holds, by the digest of the file."""
    size = path.stat().st_size
    with path.open("r+b") as file, PieceDigests(file.fileno(), size, size) as pieces:
        pieces.fill_in()


def content_of(path: Path, stated: str) -> str:
    """Return the digest of the file at `path`, with zeros in place of the digest that it states.

    Raises CheckpointError when the file cannot be read or `stated` is not in it."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:  # the digest is near the beginning
            slot = content.find(stated.encode())
        if slot < 0:
            raise CheckpointError(f"{path}: its passport does not state its digest plainly; save the file again")
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            return _combined(pool.map(lambda cut: _crcs_of_range(file.fileno(), cut[0], cut[1], slot), _pieces(size)))


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(size, begin + PIECE)) for begin in range(0, size, PIECE))


def _combined(crcs: Iterable[bytes]) -> str:
    return f"{ALGORITHM}:{hashlib.sha256(b''.join(crcs)).hexdigest()}"


def _crcs_of_range(file: int, begin: int, stop: int, slot: int | None = None) -> bytes:
    """Return the CRC-32s of the blocks from byte `begin` to `stop`, as if SLOT stood at byte `slot`."""
    found = []
    for at in range(begin, stop, BLOCK):
        block = os.pread(file, min(BLOCK, stop - at), at)
        crc = zlib.crc32(block if slot is None else _with_slot(block, slot - at))
        found.append(crc.to_bytes(4, "little"))
    return b"".join(found)


def _with_slot(block: bytes, at: int) -> bytes:
    """Return `block` with the part of SLOT that falls into it; SLOT begins `at` bytes after the block begins."""
    first, last = max(at, 0), min(at + len(EMPTY), len(block))
    return block if first >= last else block[:first] + EMPTY[first - at : last - at] + block[last:]
