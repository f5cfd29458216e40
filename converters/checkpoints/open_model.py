"""Opens what a user may call a model: files, a folder of original files, a model folder, one component's folder."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...schemas.clips import misfit
from ...schemas.errors import CheckpointError, LayoutError, UsageError
from ...schemas.folders import PLACES, TOKENIZER_FOLDERS, VARIANTS, read_weights_name
from ...schemas.stages import Stage, Variant
from ...storage.weights_file import read_weights
from .find_weights import open_component_folder, weights_sets
from .identify import Component, Parts, identify_parts
from .single_files import read_files

ENCODERS = (Stage.TEXT_ENCODER, Stage.IMAGE_ENCODER)
SIDE_SUFFIXES = ("_text_model", "_text_encoder")
EMA_SUFFIX = "_ema"  # of the file in which Stability's trainer saves averaged weights beside the trained ones


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
    """The components found, the tokenizer folder if one lies beside them, what the user should know, and the paths it
    was opened from."""

    components: dict[Stage, Component]
    tokenizer: Path | None = None
    notes: tuple[str, ...] = ()
    sources: tuple[Path, ...] = ()

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
    """Read the headers of every component in `sources`; the two encoders may be given apart, and then replace those
    in the sources, whatever these are.

    Raises UsageError when a path does not exist, holds no component, or two files hold the same one, and LayoutError
    when an encoder that is given does not fit the prior or the decoder."""
    paths = [Path(source) for source in sources]
    given = {Stage.TEXT_ENCODER: text_encoder, Stage.IMAGE_ENCODER: image_encoder}
    wanted = {stage: Path(path) for stage, path in given.items() if path is not None}
    apart = {stage: _open_encoder(path, stage, choice) for stage, path in wanted.items()}
    found = [parts for path in paths for parts in _parts_at(path, choice, wanted)]
    notes = [note for parts in (*found, *apart.values()) for note in parts.notes]
    components: dict[Stage, Component] = {stage: parts.components[0] for stage, parts in apart.items()}
    for component in (component for parts in found for component in parts.components):
        _add(components, component, choice, notes)
    notes += _misfits(components, wanted)
    tokenizer = next((path / name for path in paths for name in TOKENIZER_FOLDERS if (path / name).is_dir()), None)
    notes += _misnamed(components.values())
    opened = (*paths, *(Path(path) for path in given.values() if path is not None))
    return Model(components, tokenizer, tuple(dict.fromkeys(notes)), opened)


def _open_encoder(path: Path, stage: Stage, choice: Choice) -> Parts:
    """The one encoder in a file or in a folder, of a whole CLIP model the tower that is meant."""
    _require_exists(path)
    if path.is_dir():
        return open_component_folder(path, stage, choice.variant)[0]
    return _parts_of_file(path, only=stage)


def _parts_of_file(path: Path, only: Stage | None = None, without: Collection[Stage] = ()) -> Parts:
    """The components of one file; of a shard or an index, those of all shards."""
    said = read_weights_name(path.name)
    if said is not None and (said.is_index or said.number):
        return open_component_folder(path.parent, only, said.variant, without)[0]
    return identify_parts(read_weights(path), only=only, without=without)


def _add(components: dict[Stage, Component], component: Component, choice: Choice, notes: list[str]) -> None:
    """Take `component` unless its stage is there already: another file's is an error, within one file ranks decide,
    and of two text encoders (ComfyUI's two files, diffusers' two repositories) the first is taken."""
    other = components.setdefault(component.stage, component)
    if other is component:
        return
    if other.path == component.path:
        components[component.stage] = sorted((other, component), key=lambda c: c.rank, reverse=choice.ema)[0]
        kinds = ", trained and averaged (see --ema)" if other.rank != component.rank else "; the first is taken"
        notes.append(f"{component.path}: holds the {component.stage} twice{kinds}")
    elif component.stage in ENCODERS and other.config == component.config:
        dtypes = ", ".join(other.dtypes)
        notes.append(f"{component.path}: its {component.stage} is left out for the one in {other.path} ({dtypes})")
    else:
        raise UsageError(f"{other.path} and {component.path} both hold the {component.stage}; name one of them")


def _parts_at(source: Path, choice: Choice, without: Collection[Stage]) -> list[Parts]:
    """What a source holds, but for the stages `without`, which are given apart."""
    _require_exists(source)
    if source.is_file():
        return [_parts_of_file(path, without=without) for path in (source, *_side_files(source))]
    is_pipeline = (source / "model_index.json").is_file()
    if not is_pipeline and _is_component(source):
        whole, variant = open_component_folder(source, None, choice.variant, without)
        _require_variant(source, choice, [variant])
        return [whole]
    folders, passed_over = _places_in(source, choice)
    parts = _component_folders(source, folders, choice, without)
    single = read_files(source, without)
    if not folders and not any(parts.components for parts in single.parts):
        if single.refused is not None:
            raise single.refused
        raise UsageError(
            f"{source}: no model here; expected folders such as prior/ and decoder/, "
            "or stage_a, stage_b and stage_c .safetensors files"
        )
    # A download of a whole repository has the folders of a pipeline, and the same weights as single files beside them.
    taken_stages = {component.stage for found in parts for component in found.components} if is_pipeline else set()
    files, notes = _best_of(single.parts, choice, taken_stages)
    return [*files, *parts, Parts((), (*passed_over, *notes, *single.notes))]


def _component_folders(
    source: Path, folders: dict[Stage, Path], choice: Choice, without: Collection[Stage]
) -> list[Parts]:
    """The components of a model folder, with a remark on those that lack the variant asked for."""
    found, variants = [], []
    for stage, path in folders.items():
        if stage in without:
            found.append(Parts((), (f"{path}: left out for the {stage} given",)))
            continue
        parts, taken = open_component_folder(path, stage, choice.variant)
        variants.append(taken)
        if choice.variant is not None and taken != choice.variant.lower():
            names = ", ".join(sorted({component.path.name for component in parts.components}))
            note = f"{path}: has no weights of variant {choice.variant}; {names} is taken"
            parts = replace(parts, notes=(*parts.notes, note))
        found.append(parts)
    if folders and variants:
        _require_variant(source, choice, variants)
    return found


def _require_variant(source: Path, choice: Choice, taken: Collection[str]) -> None:
    """Raise CheckpointError when a variant was asked for that no component has."""
    if choice.variant is not None and choice.variant.lower() not in taken:
        raise CheckpointError(f"{source}: no weights of variant {choice.variant}; try without --variant")


def _is_component(source: Path) -> bool:
    """Whether a folder is one component's: it has a config.json, or shards."""
    return (source / "config.json").is_file() or any(
        found.index is not None or found.shards for found in weights_sets(source).values()
    )


def _best_of(found: Sequence[Parts], choice: Choice, taken: Collection[Stage]) -> tuple[list[Parts], list[str]]:
    """Of single files that hold one stage in several sizes, precisions or averages the one that is meant, the rest
    remarked on. Files that are alike in all that stay, and are an error later; so do encoders, see _add."""
    by_stage: dict[Stage, list[Component]] = {}
    for component in (component for parts in found for component in parts.components):
        by_stage.setdefault(component.stage, []).append(component)
    dropped: set[int] = set()
    notes = []
    for stage, components in by_stage.items():
        best = min(_preference(component, choice) for component in components)
        for component in components:
            if stage in taken:
                reason = f"the {stage} of the component's folder is taken"
            elif stage not in ENCODERS and _preference(component, choice) != best:
                first = next(other for other in components if _preference(other, choice) == best)
                reason = f"{first.path.name} is taken (see --variant, --lite and --ema)"
            else:
                continue
            dropped.add(id(component))
            notes.append(f"{component.path}: its {component.describe()} is left out, {reason}")
    kept = [
        replace(parts, components=tuple(component for component in parts.components if id(component) not in dropped))
        for parts in found
    ]
    return kept, notes


def _preference(component: Component, choice: Choice) -> tuple[bool, bool, int]:
    """Less is better: trained or averaged weights, the size, the precision that a variant's name asks for."""
    averaged = component.path.stem.endswith(EMA_SUFFIX)
    dtypes = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
    (dtype, _), *_ = component.dtypes.most_common(1) or [("", 0)]
    precision = dtypes.get(dtype, dtype)
    order = [*([choice.variant.lower()] if choice.variant else []), *VARIANTS, precision]
    return averaged != choice.ema, (component.variant is Variant.LITE) != choice.lite, order.index(precision)


def _side_files(source: Path) -> list[Path]:
    """The text encoder that kohya and OneTrainer save beside a stage C, under its name with a suffix."""
    names = (f"{source.stem}{suffix}{source.suffix}" for suffix in SIDE_SUFFIXES)
    return [path for path in map(source.with_name, names) if path.is_file()]


def _places_in(source: Path, choice: Choice) -> tuple[dict[Stage, Path], list[str]]:
    """The folder of each component, the lite ones first when they are asked for; and remarks on the others."""
    folders: dict[Stage, Path] = {}
    notes = []
    for place in sorted(PLACES, key=lambda place: place.lite != choice.lite):
        path = source / place.folder
        if not path.is_dir() or not any(not entry.name.startswith(".") for entry in path.iterdir()):
            continue
        first = folders.setdefault(place.stage, path)
        if first != path:
            advice = " (see --lite)" if place.lite or choice.lite else ""
            notes.append(f"{path}: left out, {first.name} is taken{advice}")
    return folders, notes


def _misfits(components: dict[Stage, Component], given: Collection[Stage]) -> list[str]:
    """Leave out encoders that feed neither the prior nor the decoder; one that was given is an error.

    Raises LayoutError for it, naming what it is and what is expected."""
    configs = [component.config for component in components.values()]
    notes = []
    for stage in ENCODERS:
        if stage not in components or not (reason := misfit(components[stage].config, configs)):
            continue
        if stage in given or not _is_spare(components[stage], components):
            raise LayoutError(f"{components[stage].path}: the {stage} is {reason}")
        notes.append(f"{components.pop(stage).path}: the {stage} is left out: it is {reason}")
    return notes


def _is_spare(component: Component, components: dict[Stage, Component]) -> bool:
    """Whether the file of an encoder is there for its other tower."""
    others = (components[stage] for stage in ENCODERS if stage in components and stage is not component.stage)
    return any(other.path == component.path for other in others)


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
