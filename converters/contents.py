"""Reads the headers at a path and describes its contents: checkpoints, a LoRA, a bundle, or a generated image."""

from __future__ import annotations  # help() shows the types as they are written here

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..schemas.callbacks import Say, ignored
from ..schemas.errors import LayoutError, UsageError
from ..schemas.folders import MANIFEST_NAME, MODEL_INDEXES
from ..schemas.layouts import can_become
from ..schemas.messages import known_keywords, reason
from ..schemas.passport_keys import KEY, without_passport

if TYPE_CHECKING:
    from ..runtime.images.png_text import ImageText
    from ..runtime.images.provenance import ManifestFacts
    from ..schemas.manifest import Manifest, StageEntry
    from ..schemas.plan_entries import PlanEntry
    from ..storage.bundle import Bundle
    from .checkpoints.component import Component
    from .passport_check import PassportState


@dataclass(frozen=True)
class CheckpointContents:
    """The components found, and the passports of their files. True when none has missing, unexpected or wrongly shaped
    tensors, and no file differs from its passport."""

    components: tuple[Component, ...]
    passports: tuple[PassportState, ...] = ()

    def __bool__(self) -> bool:
        sound = not any(component.problems for component in self.components)
        return sound and all(state.good for state in self.passports)

    def to_json(self) -> list[dict[str, Any]]:
        """The facts of each component, as plain values, with the passports of its files and of its folder."""
        return [
            {**component_facts(component), "passports": [state.to_json() for state in self.passports_of(component)]}
            for component in self.components
        ]

    def passports_of(self, component: Component) -> list[PassportState]:
        """The passports of the component's files, and of the folder that it is in."""
        files = {tensor.path for tensor in component.tensors.values()}
        parents = {*component.path.parents}
        return [
            state
            for state in self.passports
            if state.path in files or (state.path.name in MODEL_INDEXES and state.path.parent in parents)
        ]


@dataclass(frozen=True)
class LoraContents:
    """The facts of a LoRA, those of `converters.lora.inspect_lora`. True when its file is as its passport says."""

    facts: dict[str, Any]
    passports: tuple[PassportState, ...] = ()

    def __bool__(self) -> bool:
        return all(state.good for state in self.passports)

    def to_json(self) -> list[dict[str, Any]]:
        """The facts as the only item of a list, named a LoRA."""
        return [{"component": "lora", **self.facts, "passports": [state.to_json() for state in self.passports]}]


@dataclass(frozen=True)
class GraphContents:
    """An ONNX graph: its facts as plain values, and its passport. True when the file is as its passport says."""

    facts: dict[str, Any]
    passport: PassportState

    def __bool__(self) -> bool:
        return self.passport.good

    def to_json(self) -> dict[str, Any]:
        """The facts and the passport, as plain values."""
        return {**self.facts, "passports": [self.passport.to_json()]}


@dataclass(frozen=True)
class ImageContents:
    """An image that cascadekit generated: its size in pixels, the settings in it, and its C2PA manifest if it has one.

    Always true."""

    path: Path
    width: int
    height: int
    settings: dict[str, Any]
    c2pa: ManifestFacts | None = None

    def to_json(self) -> dict[str, Any]:
        """The size, the settings and the manifest, as plain values."""
        size = {"path": str(self.path), "width": self.width, "height": self.height}
        return {**size, "settings": self.settings, "c2pa": self.c2pa and asdict(self.c2pa)}


@dataclass(frozen=True)
class PlanState:
    """The result of comparing a plan file with the manifest."""

    good: bool
    text: str  # "ok", or the difference


@dataclass(frozen=True)
class BundleContents:
    """A bundle's manifest, the state of each plan by its path, and how other files differ from the manifest, likewise.

    True when all files agree with the manifest."""

    manifest: Manifest
    plan_states: Mapping[str, PlanState]
    changed: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return not self.changed and all(state.good for state in self.plan_states.values())

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain values; each plan has its state in addition."""
        content: dict[str, Any] = {**self.manifest.model_dump(mode="json"), "changed": dict(self.changed)}
        for stage in content["stages"].values():
            for plan in stage["plans"]:
                plan["state"] = self.plan_states[plan["path"]].text
        return content


Contents = BundleContents | CheckpointContents | GraphContents | ImageContents | LoraContents

# How the files of pictures begin; a WebP file names its kind after eight bytes.
PICTURES = {b"\x89PNG\r\n": "PNG", b"\xff\xd8\xff": "JPEG", b"RIFF": "WebP"}


@known_keywords
def contents_of(path: str | Path, *, hash: bool = False, say: Say = ignored) -> Contents:
    """Find out what `path` holds: a bundle, a LoRA, a generated image, an ONNX graph, or components of the cascade, on
    disk or as ``hf://...``. The command ``inspect`` prints the result, which has `to_json`.

    `say` is called with each line that the user should know, such as files that were passed over. With `hash`, every
    byte is compared with the passports of files, or with the manifest of a bundle.
    Raises CheckpointError for a damaged file or manifest, LayoutError when no component is found, UsageError when
    there is nothing at `path`.

    Examples:
        >>> sorted(contents_of("bundle").to_json()["stages"])
        ['decoder', 'prior', 'text_encoder', 'vqgan']
    """
    path = Path(path)
    if (path / MANIFEST_NAME).is_file():
        return _bundle_contents(path, hash=hash)
    if kind := _picture_kind(path):
        return _image_contents(path, kind)
    if path.suffix.lower() == ".onnx" and path.is_file():
        from .graph_contents import graph_facts

        return GraphContents(*graph_facts(path, hash=hash))
    return _model_contents(path, say, hash=hash)


def component_facts(component: Component) -> dict[str, Any]:
    """The facts of one component, as plain values."""
    from ..schemas.config_json import to_json
    from .checkpoints.provenance import licence_fields

    return {
        "path": str(component.path),
        "component": component.stage,
        "layout": component.layout,
        "variant": component.variant,
        "dtypes": component.dtypes,
        "tensors": len(component.tensors),
        "parameters": component.parameters,
        "quantised": {name: facts._asdict() for name, facts in component.quantised.items()},
        "problems": component.problems.lines(),
        "can_become": can_become(component.stage),
        "config": to_json(component.config),
        "licence": licence_fields(component.metadata),
        "metadata": without_passport(component.metadata),
    }


def _picture_kind(path: Path) -> str | None:
    """The format of the picture at `path`; None for any other file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        first = file.read(12)
    kind = next((kind for mark, kind in PICTURES.items() if first.startswith(mark)), None)
    return None if kind == "WebP" and first[8:] != b"WEBP" else kind


def _image_contents(path: Path, kind: str) -> ImageContents:
    """The image at `path`. Raises LayoutError for one without settings of cascadekit."""
    from ..runtime.images.png_text import read_png_text
    from ..runtime.images.provenance import read_manifest

    try:
        found = read_png_text(path) if kind == "PNG" else _photo_text(path)
        settings = found.settings()
    except ValueError as error:
        raise LayoutError(f"{path}: a {kind} file that cannot be read: {reason(error)}; give another file") from error
    if settings is None:
        raise LayoutError(
            f"{path}: a {kind} file without settings of cascadekit; editors and messengers drop them, give the file as "
            "`cascadekit generate` wrote it"
        )
    return ImageContents(path, found.width, found.height, settings, read_manifest(path))


def _photo_text(path: Path) -> ImageText:
    """The size and the settings of a JPEG or WebP. Raises ValueError for a damaged one, OSError as the system does."""
    from ..runtime.images.photo import read_photo_text

    try:
        return read_photo_text(path)
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError("it is damaged, or cut short") from error  # by Pillow's reading


def _bundle_contents(path: Path, *, hash: bool) -> BundleContents:
    from ..storage.bundle import open_bundle
    from ..storage.file_hashes import find_change

    bundle = open_bundle(path)
    stages = bundle.manifest.stages.values()
    files = [*bundle.manifest.files, *(file for entry in stages for file in entry.files)]
    changes = {file.path: find_change(bundle.root / file.path, file, always_hash=hash) for file in files}
    plans = {plan.path: _plan_state(bundle, entry, plan) for entry in stages for plan in entry.plans}
    return BundleContents(bundle.manifest, plans, {name: text for name, text in changes.items() if text})


def _plan_state(bundle: Bundle, entry: StageEntry, plan: PlanEntry) -> PlanState:
    from ..runtime.engines.tensorrt.plan_header import find_contradiction

    problem = find_contradiction(bundle.root / plan.path, plan)
    if problem:
        return PlanState(False, f"{problem}; build it again")
    return PlanState(True, "ok" if entry.is_current(plan) else "of other weights than the stage has now")


def _model_contents(path: Path, say: Say, *, hash: bool) -> CheckpointContents | LoraContents:
    from .checkpoints.inspect_checkpoint import inspect

    try:
        model = inspect(path)
    except (LayoutError, UsageError):
        facts = _lora_facts(path)
        if facts is None:
            raise
        from .passport_check import check_passports

        return LoraContents(facts, check_passports([Path(facts["path"])], hash=hash))
    for text in model.notes:
        say(text)
    components = (*model.components.values(), *model.alternatives)
    return CheckpointContents(components, _passports(path, components, hash=hash))


def _passports(path: Path, components: Iterable[Component], *, hash: bool) -> tuple[PassportState, ...]:
    """The passports of the files of `components`. For files on the Hub, only headers are looked at."""
    from .passport_check import check_folder, check_passport, check_passports

    files = sorted({tensor.path for component in components for tensor in component.tensors.values()})
    if not path.exists():
        if hash:
            raise UsageError(f"{path}: only its headers are read here; download it, then compare its bytes")
        return tuple(check_passport(c.path, c.metadata[KEY], hash=False) for c in components if KEY in c.metadata)
    return (*check_folder(path, hash=hash), *check_passports(files, hash=hash))


def _lora_facts(path: Path) -> dict[str, Any] | None:
    """The facts of the LoRA at `path`; None when `path` is no LoRA."""
    from .lora.inspect_lora import summary
    from .lora.read_formats import holds_lora, open_lora

    if not path.exists() or not holds_lora(path):
        return None
    return summary(open_lora(path))
