"""Finds the weights files in a folder: in one component's folder, or single files beside each other.

A component's folder may hold several sets of the same weights, such as variants or pickles. One set is read, and its
shards become one header. Every file that is not read gets a note.
"""

import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...schemas.config_json import from_json
from ...schemas.errors import CascadeError, CheckpointError, ForeignError
from ...schemas.folders import (
    COMBINED_FOLDERS,
    FORMATS,
    PLACES,
    STEMS,
    TOKENIZER_FOLDERS,
    WEIGHTS_SUFFIXES,
    preferred_variants,
    read_weights_name,
    stray_kind,
)
from ...schemas.json_text import load_object
from ...schemas.limits import MAX_FOLDER_ENTRIES
from ...schemas.messages import listed, reason
from ...schemas.stages import NetworkConfig, Stage
from ...schemas.tensors import Shape
from ...storage.safetensors_reader import Header
from ...storage.weights_file import read_weights
from .component import Component
from .identify import FileContents, ReadConfig, identify_all

PLAIN_NAME = re.compile(r"(?!\.+$)[\w.() -]+")  # a file name without a folder
LEGACY_CLASS = "StableCascadeUnet"  # the first diffusers class, whose config has the keys of the original code

CONTROLNETS = "controlnet"  # the folder of Stability's ControlNets
# The names of Stability's files begin so. A damaged one stops a conversion, whose output would lack its component.
RELEASED = ("stage_", "stable_cascade_stage_", "effnet_encoder", "previewer")
_KNOWN_FOLDERS = {*(place.folder.partition("/")[0] for place in PLACES), *COMBINED_FOLDERS.values()}


@dataclass
class WeightsSet:
    """The files of a folder that hold the same weights: one file, or shards with or without their index."""

    single: Path | None = None
    index: Path | None = None
    shards: dict[int, dict[int, Path]] = field(default_factory=dict)  # by the count in their names, then by number


WeightsSets = dict[tuple[str, str], WeightsSet]  # by variant and format
WeightsRead = tuple[Header, tuple[Path, ...], tuple[str, ...]]  # with the files that were read, and notes for the user


def weights_sets(folder: Path) -> WeightsSets:
    """Group the weights files of a component's folder by the names that diffusers and transformers give them."""
    sets: WeightsSets = {}
    for path in sorted(folder.iterdir()):
        name = read_weights_name(path.name)
        if name is None or not path.is_file():
            continue
        found = sets.setdefault((name.variant, name.format), WeightsSet())
        if name.is_index:
            found.index = found.index or path
        elif name.number:
            found.shards.setdefault(name.count, {})[name.number] = path
        else:
            found.single = found.single or path
    return sets


def open_component_folder(
    folder: Path, expected: Stage | None = None, variant: str | None = None, without: Collection[Stage] = ()
) -> tuple[FileContents, str]:
    """Return the component in a folder, and the variant of the weights that were read ("" for the plain ones).

    `expected` chooses one tower of a whole CLIP model. If the folder lacks the `variant`, other weights are read, and
    the caller adds a note. Raises CheckpointError when there are no weights or shards are missing."""
    sets = weights_sets(folder)
    chosen = _choose_set(sets, variant)
    header, files, notes = _read_only_file(folder) if chosen is None else _read_set(folder, sets[chosen])
    contents = identify_all(header, _config_reader(folder), only=expected, without=without)
    offered = [*_weights_files(folder), *(found.index for found in sets.values() if found.index)]
    others = [path.name for path in offered if path not in files]
    left_out = (f"{folder}: left out {listed(others)}, for {files[0].name} was taken",) if others else ()
    return replace(contents, notes=(*contents.notes, *notes, *left_out)), chosen[0] if chosen else ""


def _choose_set(sets: WeightsSets, variant: str | None) -> tuple[str, str] | None:
    """Return the set to read: the variant asked for, else the plain weights, else any; safetensors before pickles."""
    wanted = preferred_variants({name for name, _ in sets}, variant)
    return next(((name, kind) for name in wanted for kind in FORMATS if (name, kind) in sets), None)


def _read_only_file(folder: Path) -> WeightsRead:
    """Read the only weights file of a folder, whose name neither diffusers nor transformers would give."""
    files = _weights_files(folder)
    if len(files) == 1:
        return read_weights(files[0]), (files[0],), ()
    names = f"{STEMS[0]}.safetensors or {STEMS[1]}.safetensors"
    have = f"; it has {', '.join(path.name for path in files)}: name one of them" if files else ""
    raise CheckpointError(f"{folder}: no weights; expected {names}{have}")


def _weights_files(folder: Path) -> list[Path]:
    """Return the files with a suffix of weights, without hidden ones."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in WEIGHTS_SUFFIXES and not path.name.startswith(".") and path.is_file()
    ]


def _read_set(folder: Path, found: WeightsSet) -> WeightsRead:
    if found.single is not None:
        return read_weights(found.single), (found.single,), ()
    if found.index is not None:
        return _read_indexed(folder, found.index)
    if len(found.shards) > 1:
        counts = " and ".join(f"of {count}" for count in sorted(found.shards))
        raise CheckpointError(f"{folder}: has shards of several saves ({counts}); keep the shards of one save")
    ((count, numbered),) = found.shards.items()
    missing = next(number for number in range(1, count + 2) if number not in numbered)
    if missing <= count:
        raise CheckpointError(
            f"{folder}: shard {missing} of {count} is missing ({len(numbered)} are there); download the folder again"
        )
    shards = [read_weights(numbered[number]) for number in range(1, count + 1)]
    tensors = {name: tensor for shard in shards for name, tensor in shard.tensors.items()}
    if len(tensors) < sum(len(shard.tensors) for shard in shards):
        raise CheckpointError(f"{folder}: two shards hold the same tensor; keep the shards of one save")
    return replace(shards[0], tensors=tensors), tuple(shard.path for shard in shards), ()


def _read_indexed(folder: Path, index: Path) -> WeightsRead:
    weight_map: Any = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{index}: damaged: expected a weight_map from tensors to file names; download it again")
    outside = [name for name in names if not PLAIN_NAME.fullmatch(name)]
    if outside:
        raise CheckpointError(f"{index}: refers to {outside[0]!r}, which is not a file beside it; download it again")
    shards = {name: read_weights(folder / name) for name in sorted(set(weight_map.values()))}
    lost = [name for name, file in weight_map.items() if name not in shards[file].tensors]
    if lost:
        raise CheckpointError(f"{index}: {lost[0]} is not in {weight_map[lost[0]]}; download the folder again")
    tensors = {name: shards[file].tensors[name] for name, file in weight_map.items()}
    order = list(shards)
    tensors = dict(sorted(tensors.items(), key=lambda item: (order.index(item[1].path.name), item[1].offset)))
    header = replace(next(iter(shards.values())), path=index, tensors=tensors)
    surplus = [name for shard in shards.values() for name in shard.tensors if name not in weight_map]
    notes = (f"{index}: does not list {len(surplus)} of the shards' tensors ({listed(surplus)}); they are left out",)
    return header, (index, *(folder / name for name in shards)), notes if surplus else ()


def _config_reader(folder: Path) -> ReadConfig:
    """Return a function that reads each stage's config from the folder's config.json, where there is one."""
    path = folder / "config.json"
    values = read_json(path) if path.is_file() else None

    def read_config(stage: Stage, shapes: Mapping[str, Shape]) -> NetworkConfig | None:
        if values is None or values.get("_class_name") == LEGACY_CLASS:
            return None  # the config is inferred from the tensors
        try:
            return from_json(stage, values, shapes)
        except CascadeError as error:
            raise type(error)(f"{path}: {error}") from error

    return read_config


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises CheckpointError for any other content."""
    try:
        return load_object(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {reason(error)}; download or save it again") from error


def open_single_files(folder: Path, without: Collection[Stage] = ()) -> tuple[FileContents, CascadeError | None]:
    """Read the headers of all weights files in `folder` and in its controlnet/.

    Returns the components, with notes on all other files, and the error of the first file without a component. Raises
    CheckpointError for a damaged file with the name of a released one, and LayoutError for a network whose config
    cannot be read."""
    components: list[Component] = []
    notes: list[str] = []
    refused: CascadeError | None = None
    for path in (*_sorted_entries(folder), *_sorted_entries(folder / CONTROLNETS)):
        if path.is_dir():
            continue
        if kind := _stray_kind(path):
            notes.append(f"{path}: left out, {kind}")
        elif path.suffix.lower() in WEIGHTS_SUFFIXES:
            try:
                found = identify_all(read_weights(path), without=without)
                components += found.components
                notes += found.notes
            except (ForeignError, CheckpointError) as error:
                if isinstance(error, CheckpointError) and path.name.lower().startswith(RELEASED):
                    raise
                refused = refused or error
                notes.append(f"left out: {error}")
    return FileContents(tuple(components), (*notes, *_notes_on_other_folders(folder))), refused


def _sorted_entries(folder: Path) -> list[Path]:
    """Return the entries of a folder sorted by name; none where there is no folder."""
    if not folder.is_dir():
        return []
    names = os.listdir(folder)
    if len(names) > MAX_FOLDER_ENTRIES:
        raise CheckpointError(
            f"{folder}: holds {len(names)} files, more than {MAX_FOLDER_ENTRIES}; give the weights files themselves"
        )
    return [folder / name for name in sorted(names)]


def _stray_kind(path: Path) -> str | None:
    """Return why a file is not to be opened; None when it may be."""
    kind = stray_kind(path.name)
    if kind is None and path.suffix.lower() in WEIGHTS_SUFFIXES:
        if path.is_symlink() and not path.exists():
            return "a link that leads nowhere"
        if not path.is_file():
            return "not a regular file"
        if path.name.startswith("."):
            return "a hidden file"
    return kind


def _notes_on_other_folders(folder: Path) -> Iterator[str]:
    """Yield a note for each folder that holds weights and is not a component's folder."""
    for inner in _sorted_entries(folder):
        known = inner.name in _KNOWN_FOLDERS or inner.name in TOKENIZER_FOLDERS or inner.name.startswith(".")
        if known or not inner.is_dir():
            continue
        weights = [path.name for path in _sorted_entries(inner) if path.suffix.lower() in WEIGHTS_SUFFIXES]
        if weights:
            yield f"{inner}: left out, it is no component's folder ({listed(weights)})"
