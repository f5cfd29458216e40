"""Selects the files of a repository to download, by their names alone."""

from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

from ...schemas.errors import UsageError
from ...schemas.folders import COMBINED_FOLDERS, PLACES, TOKENIZER_FOLDERS, preferred_variants, read_weights_name
from ...schemas.messages import listed
from ...storage.replaceable_folders import MODEL_INDEXES, MODULAR_FILES
from ..checkpoints.provenance import is_provenance_name
from .source import PICKLES, WEIGHTS, HubSource, is_plain, is_weights

OTHER_FOLDERS = (
    *TOKENIZER_FOLDERS,
    *COMBINED_FOLDERS.values(),
    "scheduler",
    "prior_scheduler",
    "feature_extractor",
    "prior_feature_extractor",
)
TOKENIZER_TEXTS = ("merges.txt", "vocab.txt")
MAX_HEADERS = 64  # files of one repository whose headers are read; Stable Cascade has about twenty


def select(files: Iterable[str], wanted: HubSource, variant: str | None = None, lite: bool = False) -> tuple[str, ...]:
    """Return the `files` of a repository to download for the model at `wanted`.

    Raises UsageError when there are no weights, or several files of one stage without a way to choose."""
    names = sorted(name for name in files if is_plain(name))
    if wanted.is_file:
        chosen = {wanted.path} & set(names)
        folders = {""}
    else:
        below = _below(names, wanted.path)
        folders = _component_folders(below, lite)
        found = sorted(_model_files(below, folders, variant))
        _refuse_doubles(wanted, found)
        _require_variant(wanted, found, variant)
        chosen = {_join(wanted.path, name) for name in found}
    if not any(is_weights(name) for name in chosen):
        raise UsageError(_nothing_there(names, wanted))
    homes = {_join(wanted.path, folder) for folder in folders}
    homes |= {str(parent) if parent.name else "" for parent in PurePosixPath(wanted.path, "x").parents}
    provenance = {name for name in names if _folder(name) in homes and is_provenance_name(base_name(name))}
    return tuple(sorted(chosen | provenance))


def weights_below(wanted: HubSource, files: Iterable[str]) -> list[str]:
    """Return the weights files in the folder at `wanted`. Raises UsageError when there are none or too many."""
    names = sorted(name for name in files if is_plain(name))
    found = [_join(wanted.path, name) for name in _below(names, wanted.path) if is_weights(name)]
    if not found:
        raise UsageError(_nothing_there(names, wanted))
    if len(found) > MAX_HEADERS:
        raise UsageError(f"{wanted}: holds {len(found)} {WEIGHTS} files, too many to read; name a folder or file")
    return found


def base_name(name: str) -> str:
    """Return the part of a path behind its last slash."""
    return name.rpartition("/")[2]


def _component_folders(names: list[str], lite: bool) -> set[str]:
    """Return the folders of a model that hold components; "" when the model is one component's folder."""
    if "config.json" in names:
        return {""}
    filled = {_folder(name) for name in names}
    chosen: dict[str, str] = {}
    for place in sorted(PLACES, key=lambda place: place.lite != lite):
        if place.folder in filled:
            chosen.setdefault(place.stage, place.folder)
    return set(chosen.values())


def _model_files(names: list[str], folders: set[str], variant: str | None) -> Iterator[str]:
    """Yield the files of a folder that `open_model` reads."""
    for folder in folders:
        inside = [base_name(name) for name in names if _folder(name) == folder]
        yield from (_join(folder, name) for name in _component_weights(inside, variant))
    # Single files beside the index of a pipeline are the same weights in another layout.
    if "" not in folders and not any(index in names for index in MODEL_INDEXES):
        yield from (name for name in names if _folder(name) in ("", "controlnet") and is_weights(name))
    known = folders | {"", *OTHER_FOLDERS}
    for name in names:
        index = ".index" in name  # the index of the shards that are taken was yielded above
        if _folder(name) in known and ((name.endswith(".json") and not index) or base_name(name) in TOKENIZER_TEXTS):
            yield name
    if MODULAR_FILES[0] in names:
        yield from (name for name in MODULAR_FILES if name in names and not name.endswith(".json"))


def _component_weights(names: list[str], variant: str | None) -> list[str]:
    """Return the one file, or the index and shards, that `open_model` would take from a component's folder."""
    known = {name: facts for name in names if (facts := read_weights_name(name)) and facts.format == "safetensors"}
    for one in preferred_variants({facts.variant for facts in known.values()}, variant):
        found = [name for name, facts in known.items() if facts.variant == one]
        single = [name for name in found if not known[name].is_index and not known[name].number]
        if found:
            return single[:1] or found
    return []


def _refuse_doubles(wanted: HubSource, names: Iterable[str]) -> None:
    """Raise UsageError for several files of one stage: Stability's repository has four of each, 40 GB in all."""
    for stage in ("stage_a", "stage_b", "stage_c"):
        found = [name for name in names if name.startswith(stage) and is_weights(name)]
        if len(found) > 1:
            raise UsageError(
                f"{wanted}: {', '.join(found)} are all the same stage; name one, as in {wanted}/{found[0]}"
            )


def _require_variant(wanted: HubSource, names: Iterable[str], variant: str | None) -> None:
    """Raise UsageError, before any download, when no component has weights of the variant."""
    known = [facts for name in names if (facts := read_weights_name(base_name(name)))]
    if variant is not None and known and all(facts.variant != variant.lower() for facts in known):
        raise UsageError(f'{wanted}: no weights of variant {variant}; try without variant="{variant}"')


def _nothing_there(names: list[str], wanted: HubSource) -> str:
    below = names if wanted.is_file else _below(names, wanted.path)
    if any(name.lower().endswith(PICKLES) for name in below) and not any(is_weights(name) for name in below):
        return (
            f"{wanted}: only pickled weights, which are not downloaded; find {WEIGHTS} files, or download them yourself"
        )
    have = [name for name in names if is_weights(name)]
    what = "no such file" if wanted.is_file else "no model's weights here"
    return f"{wanted}: {what}; the repository has {listed(have, 8) or f'no {WEIGHTS} file'}"


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _join(folder: str, name: str) -> str:
    return "/".join(part for part in (folder, name) if part)


def _below(names: Iterable[str], folder: str) -> list[str]:
    return [name[len(folder) :].lstrip("/") for name in names if not folder or name.startswith(f"{folder}/")]
