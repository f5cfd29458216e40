"""Reads the header of any weights file: its first bytes, not its name, say whether it is safetensors or a pickle."""

from pathlib import Path

from ..runtime.integrity import require_regular
from .pickles import is_pickle, read_pickle
from .safetensors_file import Header, read_header


def read_weights(path: Path) -> Header:
    """The header of a safetensors file or of a checkpoint that torch pickled (which needs torch).

    Raises CheckpointError when the file is neither, or cannot be read."""
    require_regular(path)
    return read_pickle(path) if is_pickle(path) else read_header(path)
