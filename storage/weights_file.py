"""Reads the header of any weights file; the first bytes, not the name, decide between safetensors and a pickle."""

from pathlib import Path

from .open_file import opened
from .pickles import ZIP, read_pickle
from .safetensors_reader import Header, read_header

PICKLE = b"\x80"  # the first byte of a file by torch.save before version 1.6, or by pickle itself


def read_weights(path: Path) -> Header:
    """Read the header of a safetensors file or of a checkpoint that torch pickled (which needs torch).

    Raises CheckpointError when the file is neither, or cannot be read."""
    return read_pickle(path) if is_pickle(path) else read_header(path)


def is_pickle(path: Path) -> bool:
    """True when the file begins like those of torch.save. Raises CheckpointError when it cannot be read."""
    with opened(path) as file:
        start = file.read(9)
    # A safetensors file begins with the length of its header, which may have these bytes too; its ninth is a brace.
    return start.startswith((ZIP, PICKLE)) and start[8:] not in (b"{", b" ", b"\n", b"\r", b"\t")
