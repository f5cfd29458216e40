"""Reads the comment in the EXIF data of a JPEG or WebP file from its bytes, as the standards have them.

JPEG: ISO 10918-1, markers. WebP: RFC 9649, chunks. EXIF 2.32: a TIFF file whose first directory names the Exif one.
"""

import struct

EXIF_DIRECTORY, USER_COMMENT = 0x8769, 0x9286
NAME = b"Exif\0\0"  # before the TIFF file in a JPEG


def user_comment(content: bytes) -> bytes:
    """The bytes of UserComment, with the 8 that name their encoding."""
    tiff = _of_webp(content) if content.startswith(b"RIFF") else _of_jpeg(content)
    order = {b"II": "<", b"MM": ">"}[tiff[:2]]
    (first,) = struct.unpack(f"{order}I", tiff[4:8])
    (exif,) = struct.unpack(f"{order}I", _entry(tiff, order, first, EXIF_DIRECTORY)[1])
    count, value = _entry(tiff, order, exif, USER_COMMENT)
    (at,) = struct.unpack(f"{order}I", value)
    return tiff[at : at + count]


def _entry(tiff: bytes, order: str, at: int, tag: int) -> tuple[int, bytes]:
    """How many values the entry of a directory has, and its last four bytes: a value, or where the values are."""
    (entries,) = struct.unpack(f"{order}H", tiff[at : at + 2])
    for place in range(at + 2, at + 2 + 12 * entries, 12):
        found, _, count, value = struct.unpack(f"{order}HHI4s", tiff[place : place + 12])
        if found == tag:
            return count, value
    raise AssertionError(f"no entry {tag:#x}")


def _of_jpeg(content: bytes) -> bytes:
    at = 2
    while content[at] == 0xFF and content[at + 1] != 0xDA:  # the pixels
        (length,) = struct.unpack(">H", content[at + 2 : at + 4])
        if content[at + 1] == 0xE1 and content[at + 4 :].startswith(NAME):
            return content[at + 4 + len(NAME) : at + 2 + length]
        at += 2 + length
    raise AssertionError("no EXIF data")


def _of_webp(content: bytes) -> bytes:
    at = 12
    while at < len(content):
        kind, length = struct.unpack("<4sI", content[at : at + 8])
        if kind == b"EXIF":
            return content[at + 8 : at + 8 + length].removeprefix(NAME)
        at += 8 + length + length % 2
    raise AssertionError("no EXIF data")
