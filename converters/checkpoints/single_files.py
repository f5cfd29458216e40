"""The weights files of a folder that holds single files, and remarks on every other file that lies there."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ...schemas.errors import CascadeError, CheckpointError, ForeignError
from ...schemas.folders import COMBINED_FOLDERS, PLACES, TOKENIZER_FOLDERS, WEIGHTS_SUFFIXES, stray_kind
from ...schemas.limits import MAX_FOLDER_ENTRIES
from ...schemas.stages import Stage
from ...storage.weights_file import read_weights
from .component import listed
from .identify import Parts, identify_parts

CONTROLNETS = "controlnet"  # the folder of Stability's ControlNets
# Single files of the release begin with these; a damaged one stops a conversion, which would lack it.
RELEASED = ("stage_", "stable_cascade_stage_", "effnet_encoder", "previewer")

_KNOWN_FOLDERS = {*(place.folder.partition("/")[0] for place in PLACES), *COMBINED_FOLDERS.values()}


@dataclass(frozen=True)
class FolderFiles:
    """The single files of a folder that hold components, and what the user should know of the others."""

    parts: tuple[Parts, ...]
    notes: tuple[str, ...]
    refused: CascadeError | None = None  # of the first file that was passed over


def read_files(folder: Path, without: Iterable[Stage] = ()) -> FolderFiles:
    """Read the headers of all weights files in `folder` and its controlnet/.

    A file that holds no component is remarked on by its kind and passed over. Raises CheckpointError for a damaged
    file with the name of a released one, LayoutError for a network whose config cannot be read."""
    parts: list[Parts] = []
    notes: list[str] = []
    refused: list[CascadeError] = []
    for path in _entries(folder):
        if stray := _stray(path):
            notes.append(f"{path}: left out, {stray}")
        elif path.suffix.lower() in WEIGHTS_SUFFIXES:
            try:
                parts.append(identify_parts(read_weights(path), without=tuple(without)))
            except (ForeignError, CheckpointError) as error:
                if isinstance(error, CheckpointError) and path.name.lower().startswith(RELEASED):
                    raise
                refused.append(error)
                notes.append(f"left out: {error}")
    notes += _other_folders(folder)
    return FolderFiles(tuple(parts), tuple(notes), refused[0] if refused else None)


def _entries(folder: Path) -> Iterator[Path]:
    """What lies in the folder and in its controlnet/, folders left out."""
    for place in (folder, folder / CONTROLNETS):
        yield from (path for path in _listing(place) if not path.is_dir())


def _listing(folder: Path) -> list[Path]:
    """The entries of a folder in the order of their names; none of what is no folder."""
    if not folder.is_dir():
        return []
    names = os.listdir(folder)
    if len(names) > MAX_FOLDER_ENTRIES:
        raise CheckpointError(
            f"{folder}: holds {len(names)} files, more than {MAX_FOLDER_ENTRIES}; name the files that are meant"
        )
    return [folder / name for name in sorted(names)]


def _stray(path: Path) -> str | None:
    """What a file is that is not to be opened; None when it may be."""
    kind = stray_kind(path.name)
    if kind is None and path.suffix.lower() in WEIGHTS_SUFFIXES:
        if path.is_symlink() and not path.exists():
            return "a link that leads nowhere"
        if not path.is_file():
            return "not a regular file"
        if path.name.startswith("."):
            return "a hidden file"
    return kind


def _other_folders(folder: Path) -> Iterator[str]:
    """Remarks on folders that are no component's but hold weights."""
    for inner in _listing(folder):
        known = inner.name in _KNOWN_FOLDERS or inner.name in TOKENIZER_FOLDERS or inner.name.startswith(".")
        if known or not inner.is_dir():
            continue
        weights = [path.name for path in _listing(inner) if path.suffix.lower() in WEIGHTS_SUFFIXES]
        if weights:
            yield f"{inner}: left out, it is no component's folder ({listed(weights)})"
