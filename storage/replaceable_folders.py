"""Finds the folders that may be replaced whole: they have a marker of cascadekit and only files that belong to it."""

import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..schemas.errors import CascadeError
from ..schemas.folders import (
    BUNDLE_FORMAT,
    MANIFEST_NAME,
    MODEL_INDEX,
    MODULAR_FILES,
    MODULAR_INDEX,
    PLACES,
    STEMS,
    TRITON_FORMAT,
    TRITON_INDEX,
)
from ..schemas.json_text import load_object
from ..schemas.stages import Stage

if TYPE_CHECKING:
    from ..schemas.manifest import Manifest

DEMO_REPORT = "parity.json"  # the report of a demo
DEMO = "demo"  # the key of the report that lists the files of the demo

Owns = Callable[[str], bool]  # called with a path below the folder

_COMPONENT = rf"(?:{'|'.join(re.escape(place.folder) for place in PLACES)})"
_STEM = rf"(?:{'|'.join(STEMS)})"
_WEIGHTS = re.compile(
    rf"(?:{_COMPONENT}/)?{_STEM}(?:"
    r"(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?\.safetensors|\.safetensors\.index(?:\.(?P<indexed>\w+))?\.json)"
)
_MODEL_FILE = re.compile(
    rf"{_COMPONENT}/config\.json|(?:prior_)?scheduler/scheduler_config\.json"
    r"|(?:prior_)?feature_extractor/preprocessor_config\.json"
    r"|(?:prior_)?tokenizer/(?:tokenizer|tokenizer_config|vocab|special_tokens_map|added_tokens)\.json"
    r"|(?:prior_)?tokenizer/merges\.txt"
)
_STAGE = rf"(?:{'|'.join(map(re.escape, Stage))})"
_PLAN = re.compile(  # plans, and leftovers of a killed build or verify
    rf"{_STAGE}/plans/[^/]+\.(?:plan|json)|\.building/.*|\.{re.escape(MANIFEST_NAME)}\.(?:\w{{8}}\.)?partial(?:/.*)?"
)
_BUNDLE_FILE = re.compile(  # of a bundle whose manifest is of another version
    rf"{MANIFEST_NAME}|{_STAGE}/[^/]+\.(?:onnx|safetensors)|tokenizer/tokenizer\.json|.+\.before-lora"
)

_COMPILED = re.compile(r"[^/]+/1/__pycache__/model\.[^/]+\.pyc")  # of a repository for Triton


@dataclass(frozen=True)
class Owned:
    """A folder with a marker: all files in it, and the foreign ones, which do not belong to the marker."""

    marker: str
    files: tuple[str, ...]
    foreign: tuple[str, ...]


def owned(folder: Path, names: Collection[str], without: Path | None = None) -> Owned | None:
    """Examine the `folder` that `names` are to be written into, except for files below `without`.

    None when it has no marker of cascadekit."""
    for marker, rule in _RULES.items():
        owns = rule(folder, names)
        if owns is not None:
            files = files_in(folder, without)
            return Owned(marker, files, tuple(path for path in files if not owns(path)))
    return None


def files_in(folder: Path, without: Path | None = None) -> tuple[str, ...]:
    """Return the paths of all files and links below a folder, with "/" between. No link is followed."""
    found = []
    for root, folders, names in os.walk(folder):
        here = Path(root)
        links = [name for name in folders if (here / name).is_symlink()]
        folders[:] = [name for name in folders if name not in links and here / name != without]
        found += [(here / name).relative_to(folder).as_posix() for name in (*names, *links)]
    return tuple(sorted(found))


def stale_weights(folder: Path, names: Collection[str]) -> tuple[str, ...]:
    """Return old weights in components' folders that would be loaded together with those in `names`.

    Examples are an older conversion's shards beside a new single file, and a component that is not written again.
    Weights of another variant are not loaded together."""
    variants = _variants(names)
    if not variants:
        return ()
    places = [folder, *(folder / place.folder for place in PLACES)]
    found = [path for place in places if place.is_dir() for path in sorted(place.iterdir()) if not path.is_dir()]
    paths = [path.relative_to(folder).as_posix() for path in found]
    return tuple(path for path in paths if path not in names and _variant(path) in variants)


def has_component(names: Collection[str]) -> bool:
    return any(re.match(rf"{_COMPONENT}/", name) for name in names)


def _variant(path: str) -> str | None:
    """Return the variant of a component's weights, "" for none; None for other files."""
    match = _WEIGHTS.fullmatch(path)
    return (match["variant"] or match["indexed"] or "") if match else None


def _variants(names: Collection[str]) -> set[str]:
    return {variant for variant in map(_variant, names) if variant is not None}


def _model(folder: Path, names: Collection[str], own: Collection[str] = (MODEL_INDEX,)) -> Owns | None:
    """Owns the files that a conversion writes. Weights of other variants, licences and model cards are foreign.

    `own` are the files of the pipeline, its index first."""
    if not isinstance(_json(folder / next(iter(own))).get("_class_name"), str):
        return None
    variants = _variants(names)
    return lambda path: path in own or path in names or bool(_MODEL_FILE.fullmatch(path)) or _variant(path) in variants


def _bundle(folder: Path, names: Collection[str]) -> Owns | None:
    """Owns the files that the manifest lists, and plans, which a killed build may have left unlisted."""
    path = folder / MANIFEST_NAME
    if _json(path).get("format") != BUNDLE_FORMAT:
        return None
    from ..schemas.manifest import parse_manifest  # imports pydantic

    try:
        known = _listed(parse_manifest(path.read_text(encoding="utf-8"), str(path)))
    except CascadeError:
        return lambda path: bool(_BUNDLE_FILE.fullmatch(path) or _PLAN.fullmatch(path))
    return lambda path: path in known or bool(_PLAN.fullmatch(path))


def _listed(manifest: "Manifest") -> set[str]:
    stages = (file for entry in manifest.stages.values() for file in entry.files)
    files = {file.path for file in (*manifest.files, *stages)}
    plans = {plan.path for entry in manifest.stages.values() for plan in entry.plans}
    kept = {file.path for file in manifest.lora.kept} if manifest.lora else set()
    return {MANIFEST_NAME, *files, *plans, *kept, *filter(None, [manifest.tokenizer])}


def _demo(folder: Path, names: Collection[str]) -> Owns | None:
    """Owns the files that the demo's report lists, and later plans of its bundle."""
    made = _json(folder / DEMO_REPORT).get(DEMO)
    if not isinstance(made, list):
        return None
    bundle = _bundle(folder / "bundle", ())
    grown = bundle or (lambda path: False)
    return lambda path: path in made or (path.startswith("bundle/") and grown(path.removeprefix("bundle/")))


def _triton(folder: Path, names: Collection[str]) -> Owns | None:
    """Owns the files that the index lists, and what Python compiles from them while a server runs."""
    index = _json(folder / TRITON_INDEX)
    made = index.get("files")
    if index.get("format") != TRITON_FORMAT or not isinstance(made, list):
        return None
    return lambda path: path in made or bool(_COMPILED.fullmatch(path))


_RULES: dict[str, Callable[[Path, Collection[str]], Owns | None]] = {
    MANIFEST_NAME: _bundle,
    MODEL_INDEX: _model,
    MODULAR_INDEX: partial(_model, own=MODULAR_FILES),
    DEMO_REPORT: _demo,
    TRITON_INDEX: _triton,
}


def _json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one when there is none."""
    try:
        return load_object(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
