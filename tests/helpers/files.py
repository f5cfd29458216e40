"""Changes to files on disk that a check has to notice."""

import os
from pathlib import Path


def touch(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000))


def flip(path: Path, position: int, *, touched: bool = True) -> None:
    """One bit; with another time of change, if `touched`."""
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))
    if touched:
        touch(path)
