"""Finds the places of a zip archive's entries from its directory alone; nothing is unpacked."""

import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..schemas.errors import CheckpointError
from ..schemas.limits import MAX_ZIP_DIRECTORY
from .open_file import opened

LOCAL_HEADER = 30  # bytes of an entry's header before its name
END, END_BYTES = b"PK\x05\x06", 22  # the record at the end of an archive, without its comment
LARGE, LARGE_BYTES = b"PK\x06\x06", 76  # the record before it in an archive of 4 GB or more, with its locator
LONGEST_COMMENT = 1 << 16
ELSEWHERE = 0xFFFF_FFFF  # stands for a number that is in the other record


@dataclass(frozen=True)
class ZipEntry:
    """An entry of an archive: `nbytes` from `offset` in the file, plain or compressed."""

    name: str
    offset: int
    nbytes: int
    compressed: bool


def read_directory(path: Path) -> dict[str, ZipEntry]:
    """Return the entries of the archive at `path` by name.

    Raises CheckpointError for a damaged archive, a directory beyond the limit, and two entries of one name, since
    programs differ in which one they read."""
    try:
        with opened(path) as file:
            size = _directory_bytes(file)
            if size > MAX_ZIP_DIRECTORY:
                raise CheckpointError(
                    f"{path}: its zip directory has {size} bytes; at most {MAX_ZIP_DIRECTORY} are read"
                )
            with zipfile.ZipFile(file) as archive:
                found = archive.infolist()
            entries = {info.filename: _entry(file, info) for info in found}
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError) as error:
        raise CheckpointError(f"{path}: a damaged zip archive: {error}; download it again") from error
    if len(entries) != len(found):
        raise CheckpointError(f"{path}: refused, as two entries of its zip archive have one name; save it again")
    return entries


def _directory_bytes(file: BinaryIO) -> int:
    """Return the size of the directory, from the record at the end or the one for large archives before it."""
    end = file.seek(0, 2)
    file.seek(max(0, end - END_BYTES - LONGEST_COMMENT - LARGE_BYTES))
    tail = file.read()
    at = tail.rfind(END)
    if at < 0 or len(tail) - at < END_BYTES:
        raise zipfile.BadZipFile("the directory at its end is missing")
    sizes = [int(struct.unpack_from("<I", tail, at + 12)[0])]
    if at >= LARGE_BYTES and tail.startswith(LARGE, at - LARGE_BYTES):
        sizes.append(int(struct.unpack_from("<Q", tail, at - LARGE_BYTES + 40)[0]))
    return max((size for size in sizes if size != ELSEWHERE), default=0)


def _entry(file: BinaryIO, info: zipfile.ZipInfo) -> ZipEntry:
    """Return an entry of the directory. Its bytes begin after its own header, whose extra field has another length."""
    file.seek(info.header_offset)
    header = file.read(LOCAL_HEADER)
    if len(header) < LOCAL_HEADER or not header.startswith(b"PK\x03\x04"):
        raise zipfile.BadZipFile(f"no entry begins at byte {info.header_offset}, where {info.filename!r} should")
    name, extra = struct.unpack_from("<HH", header, 26)
    offset = info.header_offset + LOCAL_HEADER + name + extra
    return ZipEntry(info.filename, offset, info.file_size, info.compress_type != zipfile.ZIP_STORED)
