"""The sizes of files, for forecasts."""

from collections.abc import Iterable
from pathlib import Path

from ..schemas.forecast import FileSize


def sizes_of(paths: Iterable[Path]) -> tuple[FileSize, ...]:
    """Each of the files once, with its bytes on disk."""
    return tuple(FileSize(str(path), path.stat().st_size) for path in dict.fromkeys(paths))
