"""Decides by file fingerprints whether a model is the one that a bundle was exported from, and says what differs.

A verdict is about the files that a bundle was exported from, so the same weights in another file, layout or dtype are
another model. A cast or quantisation during export does not matter. A bundle with merged LoRAs is another model.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..converters.checkpoints.component import Component
from ..converters.checkpoints.open_model import Model
from ..converters.export.bundle_weights import source_files
from ..schemas.manifest import Manifest, StageEntry
from ..schemas.stages import Stage, VQGANConfig
from ..storage.file_hashes import fingerprint

WIDTHS = {4: "32-bit", 2: "16-bit", 1: "8-bit"}  # bytes of a value
SLACK = 0.5  # headers may make a small file larger by this part; a file with other networks is larger still


@dataclass(frozen=True)
class ModelDifference:
    """How one stage of a model differs from the one that was exported: a line for people, and its parts as data."""

    line: str
    scale: bool = False  # the VQGAN's scale differs
    files: bool = True  # its files are others than those of the export
    width: bool = False  # values take another number of bytes


def differences(manifest: Manifest, model: Model, stages: Sequence[Stage] = ()) -> list[ModelDifference]:
    """The chosen stages that were exported from other files than those of `model`, with what differs.

    Without `stages`, all stages of the bundle are looked at."""
    chosen = [stage for stage in stages or tuple(manifest.stages) if stage in model.components]
    found = [_other(manifest, model.components[stage], manifest.stages[stage]) for stage in chosen]
    return [*filter(None, found), *_loras(manifest)]


def cause(differs: Sequence[ModelDifference]) -> str:
    """The difference to the bundle's model: the VQGAN scale alone, the dtype of the weights, or the whole model."""
    if all(each.scale and not each.files for each in differs):
        return "another VQGAN scale"
    if any(each.width for each in differs) and all(each.scale or each.width for each in differs):
        return "weights of another dtype"
    return "another model"


def recording_differences(
    manifest: Manifest, sources: Mapping[Stage, Collection[str]], stages: Sequence[Stage] = ()
) -> list[ModelDifference]:
    """`differences` for a recording, whose `sources` are the fingerprints of the files it was made from."""
    chosen = [stage for stage in stages or tuple(manifest.stages) if stage in sources]
    other = [stage for stage in chosen if not _known(manifest.stages[stage]).issuperset(sources[stage])]
    text = "recorded from other files than those the bundle was exported from"
    return [*(ModelDifference(f"{stage}: {text}") for stage in other), *_loras(manifest)]


def _known(entry: StageEntry) -> set[str]:
    return {source.fingerprint for source in entry.sources}


def _other(manifest: Manifest, component: Component, entry: StageEntry) -> ModelDifference | None:
    """The difference of one stage; None when its files are those it was exported from."""
    scale = list(_scale(manifest, component))
    files = source_files(component)
    others, widths = list[str](), ""
    if _known(entry) != {fingerprint(path) for path in files}:
        exported = ", ".join(source.name for source in entry.sources)
        widths = _widths(component, entry, sum(path.stat().st_size for path in files))
        others = [f"exported from {exported}, this is {', '.join(path.name for path in files)}"]
        others += _details(component, entry, widths)
    if not scale and not others:
        return None
    line = f"{component.stage}: {'; '.join([*scale, *others])}"
    return ModelDifference(line, scale=bool(scale), files=bool(others), width=bool(widths))


def _widths(component: Component, entry: StageEntry, size: int) -> str:
    """The widths of the values in the bundle's source and in other files of `size` bytes; empty when they are equal."""
    before, now = (_width(each, component.parameters) for each in (sum(s.bytes for s in entry.sources), size))
    differ = component.variant == entry.variant and before and now and before != now
    return f"{before} weights, these are {now}" if differ else ""


def _details(component: Component, entry: StageEntry, widths: str) -> Iterable[str]:
    """How the other file differs, as far as its header and size tell; otherwise its weights differ."""
    layouts = {source.layout for source in entry.sources}
    if component.variant != entry.variant:
        yield f"the {entry.variant} variant, this is the {component.variant} one"
    elif widths:
        yield widths
    elif layouts == {component.layout}:
        yield "other weights, dtypes or metadata"
    if layouts != {component.layout}:
        yield f"layout {', '.join(sorted(layouts))}, this is {component.layout}"


def _scale(manifest: Manifest, component: Component) -> Iterable[str]:
    if isinstance(component.config, VQGANConfig) and component.config.scale_factor != manifest.vqgan_scale:
        yield f"scale {manifest.vqgan_scale:g}, this model's is {component.config.scale_factor:g}"


def _width(size: int, values: int) -> str | None:
    """The width of the weights in a file of `size` bytes; None when the file holds more, or a mixture of widths."""
    return next((name for width, name in WIDTHS.items() if 0 <= size / (values * width) - 1 < SLACK), None)


def _loras(manifest: Manifest) -> Iterable[ModelDifference]:
    if manifest.lora is not None:
        names = ", ".join(lora.name for lora in manifest.lora.loras)
        yield ModelDifference(f"LoRAs are merged into the bundle ({names})")
