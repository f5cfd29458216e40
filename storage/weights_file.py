"""Reads the header of any weights file; the first bytes, not the name, decide between its formats."""

from pathlib import Path

from .gguf_file import MAGIC, read_gguf
from .open_file import opened
from .pickles import ZIP, read_pickle
from .safetensors_reader import Header, read_header

# A safetensors file begins with the length of its header, which may have any bytes; its ninth byte is one of these.
HEADER_STARTS = (b"{", b" ", b"\n", b"\r", b"\t")
PICKLE = b"\x80"  # the first byte of a file by torch.save before version 1.6, or by pickle itself


def read_weights(path: Path) -> Header:
    """Read the header of a safetensors file, a GGUF file, or a checkpoint that torch pickled (which needs torch).

    Raises CheckpointError when the file is none of them, or cannot be read."""
    if is_gguf(path):
        return read_gguf(path)
    return read_pickle(path) if is_pickle(path) else read_header(path)


def is_gguf(path: Path) -> bool:
    """True when the file begins like a GGUF file. Raises CheckpointError when it cannot be read."""
    return _start(path).startswith(MAGIC)  # no header of a safetensors file is as long as these bytes would say


def is_pickle(path: Path) -> bool:
    """True when the file begins like those of torch.save. Raises CheckpointError when it cannot be read."""
    start = _start(path)
    return start.startswith((ZIP, PICKLE)) and start[8:] not in HEADER_STARTS


def _start(path: Path) -> bytes:
    with opened(path) as file:
        return file.read(9)
