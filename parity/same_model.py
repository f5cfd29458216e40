"""Decides by file fingerprints whether a model is the one that a bundle was exported from, and says what differs.

A verdict is about the files that a bundle was exported from, so the same weights in another file, layout or dtype are
another model. A cast or quantisation during export does not matter. A bundle with merged LoRAs is another model.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

from ..converters.checkpoints.component import Component
from ..converters.checkpoints.open_model import Model
from ..converters.export.bundle_weights import source_files
from ..schemas.manifest import Manifest, StageEntry
from ..schemas.stages import Stage, VQGANConfig
from ..storage.file_hashes import fingerprint

WIDTHS = {4: "32-bit", 2: "16-bit", 1: "8-bit"}  # bytes of a value
SCALE, TO_WIDTH = "scale", "weights, these are"  # in lines about the VQGAN's scale, and about the width of values
SLACK = 0.5  # headers may make a small file larger by this part; a file with other networks is larger still


def differences(manifest: Manifest, model: Model, stages: Sequence[Stage] = ()) -> list[str]:
    """A line for each chosen stage that was exported from other files than those of `model`; empty when none was.

    Without `stages`, all stages of the bundle are looked at."""
    chosen = [stage for stage in stages or tuple(manifest.stages) if stage in model.components]
    found = [_other(manifest, model.components[stage], manifest.stages[stage]) for stage in chosen]
    return [*filter(None, found), *_loras(manifest)]


def cause(differs: Sequence[str]) -> str:
    """What is not the bundle's, in words: the VQGAN scale alone, the dtype of the weights, or the whole model."""
    scales = [line for line in differs if f"{Stage.VQGAN}: {SCALE}" in line]
    widths = [line for line in differs if TO_WIDTH in line]
    if len(scales) == len(differs) and not any("; " in line for line in scales):
        return "another VQGAN scale"
    if widths and all(line in (*scales, *widths) for line in differs):
        return "weights of another dtype"
    return "another model"


def recording_differences(
    manifest: Manifest, sources: Mapping[Stage, Collection[str]], stages: Sequence[Stage] = ()
) -> list[str]:
    """`differences` for a recording, whose `sources` are the fingerprints of the files it was made from."""
    chosen = [stage for stage in stages or tuple(manifest.stages) if stage in sources]
    other = [stage for stage in chosen if not _known(manifest.stages[stage]).issuperset(sources[stage])]
    found = [f"{stage}: recorded from other files than those the bundle was exported from" for stage in other]
    return [*found, *_loras(manifest)]


def _known(entry: StageEntry) -> set[str]:
    return {source.fingerprint for source in entry.sources}


def _other(manifest: Manifest, component: Component, entry: StageEntry) -> str | None:
    """A line about one stage; None when its files are those it was exported from."""
    found = list(_scale(manifest, component))
    files = source_files(component)
    if _known(entry) != {fingerprint(path) for path in files}:
        exported = ", ".join(source.name for source in entry.sources)
        found.append(f"exported from {exported}, this is {', '.join(path.name for path in files)}")
        found += _details(component, entry, sum(path.stat().st_size for path in files))
    return f"{component.stage}: {'; '.join(found)}" if found else None


def _details(component: Component, entry: StageEntry, size: int) -> Iterable[str]:
    """How the other file differs, as far as its header and size tell; otherwise its weights differ."""
    layouts = {source.layout for source in entry.sources}
    before, now = (_width(each, component.parameters) for each in (sum(s.bytes for s in entry.sources), size))
    if component.variant != entry.variant:
        yield f"the {entry.variant} variant, this is the {component.variant} one"
    elif before and now and before != now:
        yield f"{before} {TO_WIDTH} {now}"
    elif layouts == {component.layout}:
        yield "other weights, dtypes or metadata"
    if layouts != {component.layout}:
        yield f"layout {', '.join(sorted(layouts))}, this is {component.layout}"


def _scale(manifest: Manifest, component: Component) -> Iterable[str]:
    if isinstance(component.config, VQGANConfig) and component.config.scale_factor != manifest.vqgan_scale:
        yield f"{SCALE} {manifest.vqgan_scale:g}, this model's is {component.config.scale_factor:g}"


def _width(size: int, values: int) -> str | None:
    """The width of the weights in a file of `size` bytes; None when the file holds more, or a mixture of widths."""
    return next((name for width, name in WIDTHS.items() if 0 <= size / (values * width) - 1 < SLACK), None)


def _loras(manifest: Manifest) -> Iterable[str]:
    if manifest.lora is not None:
        yield f"LoRAs are merged into the bundle ({', '.join(lora.name for lora in manifest.lora.loras)})"
