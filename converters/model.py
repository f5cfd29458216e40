"""Opens what a user may call a model: files, a folder of original files, a model folder, one component's folder."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..schemas.config_json import from_json
from ..schemas.errors import CascadeError, CheckpointError, UsageError
from ..schemas.folders import PLACES, STEMS, TOKENIZER_FOLDERS, VARIANTS, weights_names
from ..schemas.json_text import load_json
from ..schemas.layouts import stage_of
from ..schemas.stages import NetworkConfig, Stage
from .identify import Component, Parts, identify, identify_parts
from .pickles import read_pickle
from .safetensors_file import Header, read_header
from .weights_file import read_weights

PLAIN_NAME = re.compile(r"(?!\.+$)[\w.() -]+")  # of a file, without a folder
SIDE_SUFFIXES = ("_text_model", "_text_encoder")
LEGACY_CLASS = "StableCascadeUnet"  # of the first days, with the config keys of the original code


@dataclass(frozen=True)
class Choice:
    """What to take where a source offers several: a weights variant ("bf16", "fp16"; None: the plain file, else any),
    the lite stages beside the full ones, the moving average beside the trained weights."""

    variant: str | None = None
    lite: bool = False
    ema: bool = False


DEFAULT_CHOICE = Choice()


@dataclass(frozen=True)
class Model:
    """The components found, the tokenizer folder if one lies beside them, and what the user should know."""

    components: dict[Stage, Component]
    tokenizer: Path | None = None
    notes: tuple[str, ...] = ()

    def component(self, stage: Stage) -> Component:
        """The component of `stage`, sound. Raises UsageError when the model has none."""
        if stage not in self.components:
            have = ", ".join(self.components) or "nothing"
            raise UsageError(f"the model has no {stage}; it has {have}")
        return self.components[stage].require_sound()


def inspect(path: str | Path) -> Model:
    """What the file or folder at `path` holds, from its headers alone; problems are listed per component."""
    return open_model([Path(path)])


def open_model(
    sources: Sequence[str | Path],
    *,
    text_encoder: str | Path | None = None,
    image_encoder: str | Path | None = None,
    choice: Choice = DEFAULT_CHOICE,
) -> Model:
    """Read the headers of every component in `sources`; the two encoders may be given apart.

    Raises UsageError when a path does not exist, holds no component, or two files hold the same one."""
    paths = [Path(source) for source in sources]
    found = [parts for path in paths for parts in _parts_at(path, choice)]
    notes = [note for parts in found for note in parts.notes]
    given = {Stage.TEXT_ENCODER: text_encoder, Stage.IMAGE_ENCODER: image_encoder}
    apart = {stage: open_component(Path(path), stage, choice) for stage, path in given.items() if path is not None}
    components: dict[Stage, Component] = dict(apart)
    for component in (component for parts in found for component in parts.components):
        if component.stage not in apart:
            _add(components, component, choice, notes)
    tokenizer = next((path / name for path in paths for name in TOKENIZER_FOLDERS if (path / name).is_dir()), None)
    notes += _misnamed(components.values())
    return Model(components, tokenizer, tuple(notes))


def open_component(path: Path, expected: Stage | None = None, choice: Choice = DEFAULT_CHOICE) -> Component:
    """The one component in a safetensors file, or in a folder that holds its weights and perhaps a config.json."""
    _require_exists(path)
    if path.is_dir():
        header = _read_weights(path, choice)
        stage = expected or stage_of(header.shapes)
        return identify(header, _config_in(path, stage) if stage else None, expected)
    return identify(read_weights(path), None, expected)


def _add(components: dict[Stage, Component], component: Component, choice: Choice, notes: list[str]) -> None:
    """Take `component` unless its stage is there already: another file's is an error, within one file ranks decide,
    and of two text encoders (ComfyUI's two files, diffusers' two repositories) the first is taken."""
    other = components.setdefault(component.stage, component)
    if other is component:
        return
    if other.path == component.path:
        components[component.stage] = sorted((other, component), key=lambda c: c.rank, reverse=choice.ema)[0]
        notes.append(f"{component.path}: holds the {component.stage} twice, trained and averaged (see --ema)")
    elif component.stage in (Stage.TEXT_ENCODER, Stage.IMAGE_ENCODER) and other.config == component.config:
        dtypes = ", ".join(other.dtypes)
        notes.append(f"{component.path}: its {component.stage} is left out for the one in {other.path} ({dtypes})")
    else:
        raise UsageError(f"{other.path} and {component.path} both hold the {component.stage}; name one of them")


def _parts_at(source: Path, choice: Choice) -> list[Parts]:
    _require_exists(source)
    if source.is_file():
        return [identify_parts(read_weights(path)) for path in (source, *_side_files(source))]
    if (source / "config.json").is_file():
        return [Parts((open_component(source, None, choice),))]
    folders = _places_in(source, choice)
    # A pipeline's folder is its components; single files lie beside them in a shared download, not as part of it.
    is_pipeline = (source / "model_index.json").is_file()
    files = (
        [] if is_pipeline else sorted((*source.glob("*.safetensors"), *(source / "controlnet").glob("*.safetensors")))
    )
    if not folders and not files:
        raise UsageError(
            f"{source}: no model here; expected folders such as prior/ and decoder/, "
            "or stage_a, stage_b and stage_c .safetensors files"
        )
    parts = [identify_parts(read_weights(path)) for path in files]
    return parts + [Parts((open_component(path, stage, choice),)) for stage, path in folders.items()]


def _side_files(source: Path) -> list[Path]:
    """The text encoder that kohya and OneTrainer save beside a stage C, under its name with a suffix."""
    names = (f"{source.stem}{suffix}{source.suffix}" for suffix in SIDE_SUFFIXES)
    return [path for path in map(source.with_name, names) if path.is_file()]


def _places_in(source: Path, choice: Choice) -> dict[Stage, Path]:
    """The folder of each component, the lite ones first when they are asked for."""
    folders: dict[Stage, Path] = {}
    for place in sorted(PLACES, key=lambda place: place.lite != choice.lite):
        path = source / place.folder
        if path.is_dir() and any(path.iterdir()):
            folders.setdefault(place.stage, path)
    return folders


def _read_weights(folder: Path, choice: Choice) -> Header:
    """The header of a component folder's weights, the headers of all shards taken together."""
    for variant in VARIANTS if choice.variant is None else (choice.variant,):
        for stem in STEMS:
            single, index = (folder / name for name in weights_names(stem, variant))
            if single.is_file():
                return read_header(single)
            if index.is_file():
                return _read_shards(folder, index)
            if single.with_suffix(".bin").is_file():
                return read_pickle(single.with_suffix(".bin"))
    if choice.variant is not None:
        raise CheckpointError(f"{folder}: no weights of variant {choice.variant}; try without --variant")
    raise CheckpointError(f"{folder}: no weights; expected {STEMS[0]}.safetensors or {STEMS[1]}.safetensors")


def _read_shards(folder: Path, index: Path) -> Header:
    weight_map: Any = _read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{index}: damaged: expected a weight_map from tensors to file names")
    outside = [name for name in names if not PLAIN_NAME.fullmatch(name)]
    if outside:
        raise CheckpointError(f"{index}: refers to {outside[0]!r}, which is not a file beside it")
    shards = {name: read_header(folder / name) for name in sorted(set(weight_map.values()))}
    lost = [name for name, file in weight_map.items() if name not in shards[file].tensors]
    if lost:
        raise CheckpointError(f"{index}: {lost[0]} is not in {weight_map[lost[0]]}; download the folder again")
    tensors = {name: shards[file].tensors[name] for name, file in weight_map.items()}
    order = list(shards)
    tensors = dict(sorted(tensors.items(), key=lambda item: (order.index(item[1].path.name), item[1].offset)))
    return replace(next(iter(shards.values())), path=index, tensors=tensors)


def _config_in(folder: Path, stage: Stage) -> NetworkConfig | None:
    path = folder / "config.json"
    if not path.is_file():
        return None
    values = _read_json(path)
    if values.get("_class_name") == LEGACY_CLASS:
        return None  # the tensors tell the config, whose keys were others in those days
    try:
        return from_json(stage, values)
    except CascadeError as error:
        raise type(error)(f"{path}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = load_json(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    return values


def _require_exists(path: Path) -> None:
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")


def _misnamed(components: Iterable[Component]) -> list[str]:
    """Notes on files whose name says another stage than their content."""
    names = {Stage.PRIOR: "stage_c", Stage.DECODER: "stage_b", Stage.VQGAN: "stage_a"}
    return [
        f"{component.path} is named like {name} but holds the {component.stage}; going by its content"
        for component in components
        for stage, name in names.items()
        if component.path.name.startswith(name) and component.stage is not stage
    ]
