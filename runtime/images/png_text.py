"""The size of a PNG and one of its texts, read from the chunks before its pixels without decoding them.

Pillow reads texts of any length into memory. Here the length of a text is limited, both compressed and unpacked.
"""

import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ...schemas.json_text import load_json
from ...schemas.limits import MAX_SETTINGS

BEGINS, ENDS = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"
MOST_CHUNKS = 1000  # before the pixels; programs write about ten
HEADER, PIXELS, PLAIN, DEFLATED, INTERNATIONAL = b"IHDR", b"IDAT", b"tEXt", b"zTXt", b"iTXt"
METADATA_KEY = "cascadekit"  # of the text with the settings that generated an image


@dataclass(frozen=True)
class ImageText:
    """Width and height of an image in pixels, its text if there is one, and whether the file ends as its format does.

    Only the end of a PNG is looked at."""

    width: int
    height: int
    text: str | None
    whole: bool = True

    def settings(self) -> dict[str, Any] | None:
        """The settings in the text; None when there are none. Raises ValueError when the text is no JSON."""
        found = None if self.text is None else load_json(self.text)
        return found if isinstance(found, dict) else None


def read_png_text(path: Path) -> ImageText:
    """The size, and the last text with the keyword METADATA_KEY before the pixels.

    Raises OSError when the file cannot be read, ValueError when it is no PNG, or the text is damaged or too long."""
    key = METADATA_KEY.encode()
    size: tuple[int, int] | None = None
    text = None
    with path.open("rb") as file:
        if file.read(len(BEGINS)) != BEGINS:
            raise ValueError("not a PNG file")
        for kind, length in _chunks(file):
            if kind == HEADER:
                size = _size(_content(file, kind, length))
            elif kind in READERS and _is_named(file, key, length):
                text = READERS[kind](_content(file, kind, length)[len(key) + 1 :])
        if size is None:
            raise ValueError("a PNG file without its header")
        return ImageText(*size, text, _ends(file))


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Kind and length of each chunk before the pixels; the file is then at the chunk's content."""
    for _ in range(MOST_CHUNKS):
        begins = file.read(8)
        if len(begins) < 8:
            raise ValueError("cut short before its pixels")
        length, kind = struct.unpack(">I4s", begins)
        if kind == PIXELS:
            return
        at = file.tell()
        yield kind, length
        file.seek(at + length + 4)
    raise ValueError(f"more than {MOST_CHUNKS} chunks before its pixels")


def _is_named(file: BinaryIO, key: bytes, length: int) -> bool:
    at = file.tell()
    found = file.read(min(length, len(key) + 1))
    file.seek(at)
    return found == key + b"\0"


def _content(file: BinaryIO, kind: bytes, length: int) -> bytes:
    if length > MAX_SETTINGS:
        raise ValueError(f"a {kind.decode()} chunk of {length} bytes; expected at most {MAX_SETTINGS}")
    content, check = file.read(length), file.read(4)
    if check != struct.pack(">I", zlib.crc32(kind + content)):
        raise ValueError(f"its {kind.decode()} chunk is damaged")
    return content


def _size(header: bytes) -> tuple[int, int]:
    if len(header) < 8:
        raise ValueError("a PNG file whose header is cut short")
    width, height = struct.unpack(">II", header[:8])
    return width, height


def _inflated(content: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        found = unpacker.decompress(content, MAX_SETTINGS)
    except zlib.error as error:
        raise ValueError(f"its text cannot be unpacked: {error}") from error
    if unpacker.unconsumed_tail or not unpacker.eof:
        raise ValueError(f"its text unpacks to more than {MAX_SETTINGS} bytes, or is cut short")
    return found


def _international(content: bytes) -> str:
    """An iTXt chunk: compression flag and method, language, the keyword's translation, then the text in UTF-8."""
    packed, parts = content[:1], content[2:].split(b"\0", 2)
    if len(parts) < 3:
        raise ValueError("its text is cut short")
    return (_inflated(parts[2]) if packed == b"\1" else parts[2]).decode("utf-8")


def _ends(file: BinaryIO) -> bool:
    file.seek(-len(ENDS), 2)
    return file.read() == ENDS


READERS: Mapping[bytes, Callable[[bytes], str]] = {
    PLAIN: lambda content: content.decode("latin-1"),
    DEFLATED: lambda content: _inflated(content[1:]).decode("latin-1"),
    INTERNATIONAL: _international,
}
