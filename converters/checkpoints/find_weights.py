"""The folder of one component: which of its weights files are taken, shards put together, and its config.json."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...schemas.config_json import from_json
from ...schemas.errors import CascadeError, CheckpointError
from ...schemas.folders import FORMATS, STEMS, VARIANTS, WEIGHTS_SUFFIXES, read_weights_name
from ...schemas.json_text import load_json
from ...schemas.stages import NetworkConfig, Stage
from ...schemas.tensors import Shape
from ...storage.safetensors_header import Header
from ...storage.weights_file import read_weights
from .component import listed
from .identify import Configs, Parts, identify_parts

PLAIN_NAME = re.compile(r"(?!\.+$)[\w.() -]+")  # of a file, without a folder
LEGACY_CLASS = "StableCascadeUnet"  # of the first days, with the config keys of the original code


@dataclass
class WeightsSet:
    """The files of a folder that hold the same weights: one file, or shards with or without their index."""

    single: Path | None = None
    index: Path | None = None
    shards: dict[int, dict[int, Path]] = field(default_factory=dict)  # by their count as names say, then by number


Sets = dict[tuple[str, str], WeightsSet]  # by variant and format


def weights_sets(folder: Path) -> Sets:
    """The weights in a component's folder by the names that diffusers and transformers give them."""
    sets: Sets = {}
    for path in sorted(folder.iterdir()):
        said = read_weights_name(path.name)
        if said is None or not path.is_file():
            continue
        found = sets.setdefault((said.variant, said.format), WeightsSet())
        if said.is_index:
            found.index = found.index or path
        elif said.number:
            found.shards.setdefault(said.count, {})[said.number] = path
        else:
            found.single = found.single or path
    return sets


def open_component_folder(
    folder: Path, expected: Stage | None = None, variant: str | None = None, without: Iterable[Stage] = ()
) -> tuple[Parts, str]:
    """The component in a folder, and the variant of the weights that were taken for it ("" for the plain ones).

    Of a whole CLIP model the tower `expected` is taken. A variant that the folder does not have falls back to the
    others; whoever calls tells the user. Raises CheckpointError when there are no weights or shards are missing."""
    sets = weights_sets(folder)
    chosen = _chosen(sets, variant)
    notes: list[str] = []
    if chosen is None:
        header = _lone_file(folder)
        taken, files = "", [header.path]
    else:
        taken = chosen[0]
        header, files, notes = _read_set(folder, sets[chosen])
    parts = identify_parts(header, _configs_in(folder), only=expected, without=tuple(without))
    offered = [*_weights_files(folder), *(found.index for found in sets.values() if found.index)]
    left = [path.name for path in offered if path not in files]
    notes += [f"{folder}: left out {listed(left)}, for {files[0].name} was taken"] if left else []
    return replace(parts, notes=(*parts.notes, *notes)), taken


def _chosen(sets: Sets, variant: str | None) -> tuple[str, str] | None:
    """The set to read: the variant asked for, else the plain weights, else any; safetensors before pickles."""
    others = sorted({name for name, _ in sets} - {*VARIANTS})
    wanted = [*([variant.lower()] if variant is not None else []), *VARIANTS, *others]
    return next(((name, kind) for name in wanted for kind in FORMATS if (name, kind) in sets), None)


def _lone_file(folder: Path) -> Header:
    """The one weights file in a folder that goes by another name than diffusers and transformers give."""
    files = _weights_files(folder)
    if len(files) == 1:
        return read_weights(files[0])
    names = f"{STEMS[0]}.safetensors or {STEMS[1]}.safetensors"
    have = f"; it has {', '.join(path.name for path in files)}: name one of them" if files else ""
    raise CheckpointError(f"{folder}: no weights; expected {names}{have}")


def _weights_files(folder: Path) -> list[Path]:
    """The files that are weights by their suffix, without those that file browsers hide."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in WEIGHTS_SUFFIXES and not path.name.startswith(".") and path.is_file()
    ]


def _read_set(folder: Path, found: WeightsSet) -> tuple[Header, list[Path], list[str]]:
    """The header of a set, the files it was read from, and what the user should know."""
    if found.single is not None:
        return read_weights(found.single), [found.single], []
    if found.index is not None:
        return _read_indexed(folder, found.index)
    if len(found.shards) > 1:
        counts = " and ".join(f"of {count}" for count in sorted(found.shards))
        raise CheckpointError(f"{folder}: has shards of several saves ({counts}); keep those of one")
    ((count, numbered),) = found.shards.items()
    missing = next(number for number in range(1, count + 2) if number not in numbered)
    if missing <= count:
        raise CheckpointError(f"{folder}: shard {missing} of {count} is missing ({len(numbered)} are there)")
    shards = [read_weights(numbered[number]) for number in range(1, count + 1)]
    tensors = {name: tensor for shard in shards for name, tensor in shard.tensors.items()}
    if len(tensors) < sum(len(shard.tensors) for shard in shards):
        raise CheckpointError(f"{folder}: two shards hold the same tensor; they are not of one save")
    return replace(shards[0], tensors=tensors), [shard.path for shard in shards], []


def _read_indexed(folder: Path, index: Path) -> tuple[Header, list[Path], list[str]]:
    weight_map: Any = _read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{index}: damaged: expected a weight_map from tensors to file names")
    outside = [name for name in names if not PLAIN_NAME.fullmatch(name)]
    if outside:
        raise CheckpointError(f"{index}: refers to {outside[0]!r}, which is not a file beside it")
    shards = {name: read_weights(folder / name) for name in sorted(set(weight_map.values()))}
    lost = [name for name, file in weight_map.items() if name not in shards[file].tensors]
    if lost:
        raise CheckpointError(f"{index}: {lost[0]} is not in {weight_map[lost[0]]}; download the folder again")
    tensors = {name: shards[file].tensors[name] for name, file in weight_map.items()}
    order = list(shards)
    tensors = dict(sorted(tensors.items(), key=lambda item: (order.index(item[1].path.name), item[1].offset)))
    header = replace(next(iter(shards.values())), path=index, tensors=tensors)
    surplus = [name for shard in shards.values() for name in shard.tensors if name not in weight_map]
    notes = [f"{index}: does not list {len(surplus)} of the shards' tensors ({listed(surplus)}); they are left out"]
    return header, [index, *(folder / name for name in shards)], notes if surplus else []


def _configs_in(folder: Path) -> Configs:
    """A function that gives the config of each stage as the folder's config.json states it, if there is one."""
    path = folder / "config.json"
    values = _read_json(path) if path.is_file() else None

    def config_of(stage: Stage, shapes: Mapping[str, Shape]) -> NetworkConfig | None:
        if values is None or values.get("_class_name") == LEGACY_CLASS:
            return None  # the tensors tell the config, whose keys were others in the first days
        try:
            return from_json(stage, values, shapes)
        except CascadeError as error:
            raise type(error)(f"{path}: {error}") from error

    return config_of


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = load_json(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    return values
