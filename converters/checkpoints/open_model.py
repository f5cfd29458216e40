"""Opens a model from the paths that a user gives, reading headers alone.

A path may be a weights file, a folder of Stability's single files, a model folder, or the folder of one component.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...schemas.clips import misfit
from ...schemas.errors import CheckpointError, LayoutError, UsageError
from ...schemas.folders import (
    MANIFEST_NAME,
    MODEL_INDEX,
    MODEL_INDEXES,
    MODULAR_INDEX,
    PLACES,
    TOKENIZER_FOLDERS,
    preferred_variants,
    read_weights_name,
)
from ...schemas.layouts import Layout
from ...schemas.messages import listed
from ...schemas.stages import Stage, Variant
from ...storage.open_file import require_exists
from ...storage.weights_file import read_weights
from .component import Component
from .find_weights import open_component_folder, open_single_files, weights_sets
from .identify import FileContents, identify_all

ENCODERS = (Stage.TEXT_ENCODER, Stage.IMAGE_ENCODER)
SIDE_SUFFIXES = ("_text_model", "_text_encoder")
EMA_SUFFIX = "_ema"  # Stability's trainer saves averaged weights in a file of this suffix beside the trained ones
MODEL_MARKS = (*MODEL_INDEXES, MANIFEST_NAME, "stage_[abc]*")  # files in folders of models and bundles


@dataclass(frozen=True)
class WeightsChoice:
    """The choice among several weights of one component.

    `variant` is a name such as "bf16" (None: the plain weights, else any). `lite` prefers the lite stages to the full
    stages; `ema` prefers averaged weights to trained weights."""

    variant: str | None = None
    lite: bool = False
    ema: bool = False


@dataclass(frozen=True)
class Model:
    """The components of a model by stage, the folder of its tokenizer, notes for the user, and the opened paths.

    `alternatives` are further components of the same stages. Only `inspect` of a Hub source lists them."""

    components: dict[Stage, Component]
    tokenizer: Path | None = None
    notes: tuple[str, ...] = ()
    sources: tuple[Path, ...] = ()
    alternatives: tuple[Component, ...] = ()

    def __repr__(self) -> str:  # a component has a thousand tensors
        return f"Model({', '.join(self.components)})"

    def component(self, stage: Stage) -> Component:
        """Return the component of `stage`. Raises UsageError when there is none, LayoutError when it has problems."""
        if stage not in self.components:
            have = ", ".join(self.components) or "nothing"
            raise UsageError(f"the model has no {stage}; it has {have}")
        return self.components[stage].require_sound()


def open_model(
    sources: Sequence[str | Path],
    *,
    text_encoder: str | Path | None = None,
    image_encoder: str | Path | None = None,
    variant: str | None = None,
    lite: bool = False,
    ema: bool = False,
) -> Model:
    """Read the headers of every component in `sources`, which are paths on this machine.

    `text_encoder` and `image_encoder` are paths that replace the encoders of the sources. `variant`, `lite` and `ema`
    choose between several weights of one component, as in `convert`.

    Raises UsageError when a path does not exist, holds no component, or two files hold the same one; LayoutError when
    an encoder does not fit the prior or the decoder; CheckpointError when a file is damaged or no component has weights
    of the `variant`.

    Examples:
        >>> model = open_model(["stage_b.safetensors", "stage_c.safetensors"], text_encoder="CLIP-ViT-bigG-14")
        >>> sorted(model.components)
        ['decoder', 'prior', 'text_encoder']
    """
    choice = WeightsChoice(variant, lite, ema)
    paths, repeated = _once(map(Path, sources))
    encoders = {Stage.TEXT_ENCODER: text_encoder, Stage.IMAGE_ENCODER: image_encoder}
    given = {stage: Path(path) for stage, path in encoders.items() if path is not None}
    separate = {stage: _open_encoder(path, stage, choice) for stage, path in given.items()}
    found = [contents for path in paths for contents in _open_source(path, choice, given)]
    notes = [f"{path}: given twice, read once" for path in repeated]
    notes += [note for contents in (*found, *separate.values()) for note in contents.notes]
    components: dict[Stage, Component] = {stage: contents.components[0] for stage, contents in separate.items()}
    for component in (component for contents in found for component in contents.components):
        _add(components, component, choice, notes)
    notes += _remove_unfit_encoders(components, given)
    tokenizer = next((path / name for path in paths for name in TOKENIZER_FOLDERS if (path / name).is_dir()), None)
    notes += _notes_on_names(components.values())
    return Model(components, tokenizer, tuple(dict.fromkeys(notes)), (*paths, *given.values()))


def _once(paths: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Each file or folder once, under its first name, and the paths that name one again."""
    first: dict[Path, Path] = {}
    repeated = []
    for path in paths:
        if first.setdefault(path.resolve(), path) is not path:
            repeated.append(path)
    return list(first.values()), repeated


def _open_encoder(path: Path, stage: Stage, choice: WeightsChoice) -> FileContents:
    """Open the encoder in a file or folder. From a whole CLIP model, the tower that `stage` names is taken."""
    require_exists(path)
    if path.is_dir():
        return open_component_folder(path, stage, choice.variant)[0]
    return _open_file(path, only=stage)


def _open_file(path: Path, only: Stage | None = None, without: Collection[Stage] = ()) -> FileContents:
    """Open the components of one file. A shard or an index stands for all shards of its folder."""
    name = read_weights_name(path.name)
    if name is not None and (name.is_index or name.number):
        return open_component_folder(path.parent, only, name.variant, without)[0]
    return identify_all(read_weights(path), only=only, without=without)


def _add(components: dict[Stage, Component], component: Component, choice: WeightsChoice, notes: list[str]) -> None:
    """Add `component` unless its stage is there already.

    Within one file, the rank decides which of two components is kept. The first of two equal encoders is kept: both
    files of ComfyUI and both repositories of diffusers have one. Any other stage in two files is a UsageError."""
    other = components.setdefault(component.stage, component)
    if other is component:
        return
    if other.path == component.path:
        components[component.stage] = sorted((other, component), key=lambda c: c.rank, reverse=choice.ema)[0]
        averaged = ", trained and averaged (ema=True takes the averaged weights)"
        kinds = averaged if other.rank != component.rank else "; the first is taken"
        notes.append(f"{component.path}: holds the {component.stage} twice{kinds}")
    elif component.stage in ENCODERS and other.config == component.config:
        dtypes = ", ".join(other.dtypes)
        notes.append(f"{component.path}: its {component.stage} is left out for the one in {other.path} ({dtypes})")
    else:
        raise UsageError(f"{other.path} and {component.path} both hold the {component.stage}; name one of them")


def _open_source(source: Path, choice: WeightsChoice, without: Collection[Stage]) -> list[FileContents]:
    """Open everything in a source except the stages `without`, which the user gave separately."""
    require_exists(source)
    if source.is_file():
        return [_open_file(path, without=without) for path in (source, *_side_files(source))]
    modular = (source / MODULAR_INDEX).is_file()
    is_pipeline = modular or (source / MODEL_INDEX).is_file()
    if not is_pipeline and _is_component_folder(source):
        contents, variant = open_component_folder(source, None, choice.variant, without)
        _require_variant(source, choice, [variant])
        return [contents]
    folders, notes = _choose_folders(source, choice)
    if modular:
        from .modular_folder import read_modular_folder  # which most folders need not wait for

        named, said = read_modular_folder(source, without)
        folders |= named
        notes += said
    opened = _open_folders(source, folders, choice, without)
    if modular:
        opened = [replace(each, components=tuple(map(_as_modular, each.components))) for each in opened]
    single, refused = open_single_files(source, without)
    if not folders and not single.components:
        raise refused or UsageError(
            f"{source}: no model here; expected folders such as prior/ and decoder/, "
            f"or stage_a, stage_b and stage_c .safetensors files{_models_below(source)}"
        )
    # A download of a whole repository has the folders of a pipeline and the same weights as single files beside them.
    taken = {component.stage for contents in opened for component in contents.components} if is_pipeline else set()
    return [_choose_files(single, choice, taken), *opened, FileContents((), tuple(notes))]


def _as_modular(component: Component) -> Component:
    return replace(component, layout=Layout.MODULAR) if component.layout is Layout.DIFFUSERS else component


def _open_folders(
    source: Path, folders: dict[Stage, Path], choice: WeightsChoice, without: Collection[Stage]
) -> list[FileContents]:
    """Open the components of a model folder, with a note for each that lacks the variant asked for."""
    opened, variants = [], []
    for stage, path in folders.items():
        if stage in without:
            opened.append(FileContents((), (f"{path}: left out for the {stage} given",)))
            continue
        contents, variant = open_component_folder(path, stage, choice.variant)
        variants.append(variant)
        if choice.variant is not None and variant != choice.variant.lower():
            names = ", ".join(sorted({component.path.name for component in contents.components}))
            note = f"{path}: has no weights of variant {choice.variant}; {names} is taken"
            contents = replace(contents, notes=(*contents.notes, note))
        opened.append(contents)
    if variants:
        _require_variant(source, choice, variants)
    return opened


def _require_variant(source: Path, choice: WeightsChoice, read: Collection[str]) -> None:
    """Raise CheckpointError when the variant asked for is not among those that were `read`."""
    if choice.variant is not None and choice.variant.lower() not in read:
        name = choice.variant
        raise CheckpointError(f'{source}: no weights of variant {name}; try without variant="{name}"')


def _is_component_folder(source: Path) -> bool:
    """Return whether a folder belongs to one component: it has a config.json, or shards."""
    return (source / "config.json").is_file() or any(
        found.index is not None or found.shards for found in weights_sets(source).values()
    )


def _choose_files(found: FileContents, choice: WeightsChoice, taken: Collection[Stage]) -> FileContents:
    """Keep one of several single files that hold one stage in different sizes, precisions or averages.

    Stages in `taken` are left out. Every component that is left out gets a note. Files that do not differ in these
    ways all stay: `_add` raises an error for them later. Encoders stay too, as `_add` chooses between them."""
    kept, notes = [], list(found.notes)
    for component in found.components:
        stage, preference = component.stage, _preference(component, choice)
        rivals = (other for other in found.components if other.stage is stage)
        best = min(rivals, key=lambda other: _preference(other, choice))
        if stage in taken:
            reason = f"the {stage} of the component's folder is taken"
        elif stage not in ENCODERS and preference != _preference(best, choice):
            reason = f"{best.path.name} is taken (variant, lite and ema choose another)"
        else:
            kept.append(component)
            continue
        notes.append(f"{component.path}: its {component.describe()} is left out, {reason}")
    return FileContents(tuple(kept), tuple(notes))


def _preference(component: Component, choice: WeightsChoice) -> tuple[bool, bool, int]:
    """Return a key that is smallest for the file to take: by averaging, by size, then by precision."""
    averaged = component.path.stem.endswith(EMA_SUFFIX)
    dtypes = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
    (dtype, _), *_ = component.dtypes.most_common(1) or [("", 0)]
    precision = dtypes.get(dtype, dtype)
    order = preferred_variants([precision], choice.variant or None)
    return averaged != choice.ema, (component.variant is Variant.LITE) != choice.lite, order.index(precision)


def _side_files(source: Path) -> list[Path]:
    """Return the text encoder that kohya and OneTrainer save beside a stage C, under its name with a suffix."""
    names = (f"{source.stem}{suffix}{source.suffix}" for suffix in SIDE_SUFFIXES)
    return [path for path in map(source.with_name, names) if path.is_file()]


def _choose_folders(source: Path, choice: WeightsChoice) -> tuple[dict[Stage, Path], list[str]]:
    """Return the folder to read for each component, and a note for each folder that is left out."""
    folders: dict[Stage, Path] = {}
    notes = []
    for place in sorted(PLACES, key=lambda place: place.lite != choice.lite):
        path = source / place.folder
        if not path.is_dir() or not any(not entry.name.startswith(".") for entry in path.iterdir()):
            continue
        first = folders.setdefault(place.stage, path)
        if first != path:
            advice = f" (lite={not choice.lite} takes the other size)" if place.lite or choice.lite else ""
            notes.append(f"{path}: left out, {first.name} is taken{advice}")
    return folders, notes


def _remove_unfit_encoders(components: dict[Stage, Component], given: Collection[Stage]) -> list[str]:
    """Remove encoders that feed neither the prior nor the decoder, and return a note for each.

    Raises LayoutError for an encoder that the user gave, or that has a file of its own."""
    configs = [component.config for component in components.values()]
    notes = []
    for stage in ENCODERS:
        if stage not in components or not (reason := misfit(components[stage].config, configs)):
            continue
        if stage in given or not _is_other_tower(components[stage], components):
            raise LayoutError(f"{components[stage].path}: the {stage} is {reason}")
        notes.append(f"{components.pop(stage).path}: the {stage} is left out: it is {reason}")
    return notes


def _is_other_tower(component: Component, components: dict[Stage, Component]) -> bool:
    """Return whether the encoder's file also holds the other tower, which the user may have given the file for."""
    others = (components[stage] for stage in ENCODERS if stage in components and stage is not component.stage)
    return any(other.path == component.path for other in others)


def _models_below(folder: Path) -> str:
    """The subfolders that look like models, for a message; "" without any."""
    found = sorted({str(path.parent) for pattern in MODEL_MARKS for path in folder.glob(f"*/{pattern}")})
    return f"; did you mean {listed(found, 3)}?" if found else ""


def _notes_on_names(components: Iterable[Component]) -> list[str]:
    """Return a note for each file whose name belongs to another stage than its content."""
    names = {Stage.PRIOR: "stage_c", Stage.DECODER: "stage_b", Stage.VQGAN: "stage_a"}
    return [
        f"{component.path} is named like {name} but holds the {component.stage}; the content counts"
        for component in components
        for stage, name in names.items()
        if component.path.name.startswith(name) and component.stage is not stage
    ]
