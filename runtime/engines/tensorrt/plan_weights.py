"""Plans that take weights as inputs: whether what else they have of the weights is what the bundle has now."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from ....schemas.bundle import PlanEntry, StageEntry
from ....schemas.errors import CheckpointError
from ....storage.file_hashes import require_regular

CHUNK = 1 << 24  # bytes read at a time

Ranges = Mapping[str, Sequence[tuple[int, int]]]


def is_current(root: Path, entry: StageEntry, plan: PlanEntry) -> bool:
    """`StageEntry.is_current`, and what is built into a plan with weights as inputs is in the files of the bundle at
    `root` now. Reads that the first time; raises CheckpointError when it cannot be read."""
    return entry.is_current(plan) and has_what_is_built_in(root, plan)


def has_what_is_built_in(root: Path, plan: PlanEntry) -> bool:
    """Whether the bundle has the weights that the plan has in itself besides those it takes as inputs."""
    return plan.built_in is None or sha256_of_ranges(root, plan.built_in.ranges) == plan.built_in.sha256


def sha256_of_ranges(root: Path, ranges: Ranges) -> str:
    """SHA-256, in hexadecimal, of ranges of bytes of files below `root`, in their order. Raises CheckpointError when
    they cannot be read, or are not there."""
    files = []
    for name, parts in ranges.items():
        status = require_regular(root / name)
        files.append((root / name, status.st_size, status.st_mtime_ns, tuple(map(tuple, parts))))
    return _hashed(tuple(files))


@lru_cache(maxsize=64)
def _hashed(files: tuple[tuple[Path, int, int, tuple[tuple[int, int], ...]], ...]) -> str:
    """Once, as long as the files do not change: by their sizes and times."""
    digest = hashlib.sha256()
    for path, size, _mtime, ranges in files:
        if any(stop > size for _, stop in ranges):
            raise CheckpointError(f"{path}: has {size} bytes, a plan tells of {max(stop for _, stop in ranges)}")
        try:
            with path.open("rb", buffering=0) as file:
                for start, stop in ranges:
                    file.seek(start)
                    for at in range(start, stop, CHUNK):
                        digest.update(file.read(min(CHUNK, stop - at)))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()
