"""PNG files by the specification, with whatever chunks a test wants in them."""

import struct
import zlib

BEGINS = b"\x89PNG\r\n\x1a\n"
KEYWORD = b"cascadekit"


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def itxt(text: bytes, keyword: bytes = KEYWORD) -> bytes:
    return chunk(b"iTXt", keyword + b"\0\0\0\0\0" + text)


def packed_itxt(text: bytes, keyword: bytes = KEYWORD) -> bytes:
    return chunk(b"iTXt", keyword + b"\0\1\0\0\0" + zlib.compress(text, 9))


def ztxt(text: bytes, keyword: bytes = KEYWORD) -> bytes:
    return chunk(b"zTXt", keyword + b"\0\0" + zlib.compress(text, 9))


def plain(text: bytes, keyword: bytes = KEYWORD) -> bytes:
    return chunk(b"tEXt", keyword + b"\0" + text)


def png(*chunks: bytes, width: int = 1, height: int = 1) -> bytes:
    """A black picture, these chunks before its pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = zlib.compress((b"\0" * (3 * width + 1)) * height if width * height < 10**6 else b"\0")
    return BEGINS + header + b"".join(chunks) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
