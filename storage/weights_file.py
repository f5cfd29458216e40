"""Reads the header of any weights file: its first bytes, not its name, say whether it is safetensors or a pickle."""

import stat
from pathlib import Path

from ..schemas.errors import CheckpointError
from .pickles import ZIP, read_pickle
from .safetensors_reader import Header, read_header

PICKLE = b"\x80"  # how a file begins that torch.save wrote before version 1.6, or pickle itself


def read_weights(path: Path) -> Header:
    """The header of a safetensors file or of a checkpoint that torch pickled (which needs torch).

    Raises CheckpointError when the file is neither, or cannot be read."""
    return read_pickle(path) if is_pickle(path) else read_header(path)


def is_pickle(path: Path) -> bool:
    """Whether the file begins as what torch.save writes. Raises CheckpointError when it cannot be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise CheckpointError(f"{path}: cannot be read: not a file")
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    # A safetensors file begins with the length of its header, which may have these bytes too; its ninth is a brace.
    return start.startswith((ZIP, PICKLE)) and start[8:] not in (b"{", b" ", b"\n", b"\r", b"\t")
