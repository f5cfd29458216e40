"""Headers of safetensors and GGUF files on the Hub, read by range requests without the rest of the files.

huggingface_hub's own reader (`parse_safetensors_file_metadata`) is not used. It does not check a header against the
size of its file, and it reads the whole file from a server without range requests.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path

from ...schemas.errors import CheckpointError
from ...schemas.limits import MAX_HEADER_BYTES
from ...storage.gguf_file import MAGIC, gguf_header_in
from ...storage.safetensors_reader import Header, header_in
from ...storage.weights_file import read_weights
from .hub_errors import explaining, unreachable
from .repository import from_cache, list_files
from .select import weights_below
from .source import HubPath, HubSource, is_weights, parse
from .transfer import ask, blocks

FIRST_BYTES = 64  # the header's length, and enough bytes to recognise a file of another format
GGUF_BYTES = 1 << 17  # of the header of a GGUF file, which does not state its length; each further request has as many
MAX_SIZE = 1 << 63  # bytes; a larger file does not exist


def remote_headers(source: str | Path) -> tuple[Header, ...]:
    """Return the headers of all safetensors and GGUF files at a source on the Hub, in the order of their names.

    Only the bytes of headers are transferred. They are checked as strictly as those of local files. Without a
    connection, the files in the cache are read. Raises UsageError when there is no such file or there are more than
    MAX_HEADERS, CheckpointError for a file that cannot be read or is damaged."""
    wanted = parse(source)
    with explaining(wanted):
        try:
            names = [wanted.path] if wanted.is_file else weights_below(wanted, list_files(wanted))
            with ThreadPoolExecutor(8) as pool:
                return tuple(pool.map(_read_remote, [replace(wanted, path=name) for name in names]))
        except unreachable() as error:
            found = from_cache(wanted, error)
            paths = sorted(path for path in found.rglob("*") if is_weights(path.name)) if found.is_dir() else [found]
            return tuple(map(read_weights, paths))


def _read_remote(wanted: HubSource) -> Header:
    """Return the header of the file at `wanted`."""
    head, size = _read_range(wanted, 0, FIRST_BYTES)
    if size >= MAX_SIZE:
        raise CheckpointError(f"{wanted}: the server states a size of {size} bytes; check HF_ENDPOINT")
    if head.startswith(MAGIC):
        return _read_gguf(wanted, head, size)
    length = int.from_bytes(head[:8], "little")
    if FIRST_BYTES < 8 + length <= min(size, 8 + MAX_HEADER_BYTES):
        rest, size_then = _read_range(wanted, FIRST_BYTES, 8 + length)
        if size_then != size or len(head + rest) < 8 + length:
            raise CheckpointError(f"{wanted}: changed or was cut off while it was read; try again")
        head += rest
    return header_in(BytesIO(head), HubPath(str(wanted)), size)


def _read_gguf(wanted: HubSource, head: bytes, size: int) -> Header:
    """Return the header of a GGUF file of `size` bytes that begins with `head`; more is read as needed."""
    while True:
        try:
            return gguf_header_in(BytesIO(head), HubPath(str(wanted)), size)
        except EOFError as error:
            stop = min(size, len(head) + max(len(head), GGUF_BYTES))
            rest, size_then = _read_range(wanted, len(head), stop)
            if size_then != size or not rest:
                raise CheckpointError(f"{wanted}: changed or was cut off while it was read; try again") from error
            head += rest


def _read_range(wanted: HubSource, start: int, stop: int) -> tuple[bytes, int]:
    """Return bytes `start` to `stop` of a file (fewer at its end), and the size of the file."""
    with ask(wanted, start, stop) as answer:
        ranged = answer.status_code in (206, 416)
        fields = answer.headers
        size = fields.get("Content-Range", "").rpartition("/")[2] if ranged else fields.get("Content-Length", "")
        if not size.isdecimal():
            raise CheckpointError(f"{wanted}: the server does not state the size of the file; check HF_ENDPOINT")
        skip = 0 if ranged else start
        return b"".join(blocks(answer, stop - start + skip))[skip:], int(size)
