"""Whether a model is the one that a bundle was exported from, by the fingerprints of its files; and what differs.

The same weights in another file, layout or dtype are another model here: a bundle holds what it was made from, and a
verdict is about that. What export made of the weights (a cast, quantisation) changes nothing, LoRAs do.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

from ..converters.checkpoints.component import Component
from ..converters.checkpoints.open_model import Model
from ..converters.export.bundle_weights import source_files
from ..schemas.bundle import Manifest, StageEntry
from ..schemas.stages import Stage, VQGANConfig
from ..storage.file_hashes import fingerprint

WIDTHS = {4: "32-bit", 2: "16-bit", 1: "8-bit"}  # bytes of a value
SLACK = 0.5  # what a file may be larger by: headers of small files; one with other networks beside is larger still


def differences(manifest: Manifest, model: Model, stages: Sequence[Stage] = ()) -> list[str]:
    """What of the chosen stages (all there are by default) was exported from something else than `model` has, in
    words, a line each; empty when it is the same model."""
    chosen = [stage for stage in stages or tuple(manifest.stages) if stage in model.components]
    found = [_other(manifest, model.components[stage], manifest.stages[stage]) for stage in chosen]
    return [*filter(None, found), *_loras(manifest)]


def recorded_differences(
    manifest: Manifest, sources: Mapping[Stage, Collection[str]], stages: Sequence[Stage] = ()
) -> list[str]:
    """The same of a recording, by the fingerprints of the files it was made from."""
    chosen = [stage for stage in stages or tuple(manifest.stages) if stage in sources]
    other = [stage for stage in chosen if not _known(manifest.stages[stage]).issuperset(sources[stage])]
    found = [f"{stage}: recorded from other files than those the bundle was exported from" for stage in other]
    return [*found, *_loras(manifest)]


def _known(entry: StageEntry) -> set[str]:
    return {source.fingerprint for source in entry.sources}


def _other(manifest: Manifest, component: Component, entry: StageEntry) -> str | None:
    """What differs about one stage; None when nothing does."""
    told = list(_scale(manifest, component))
    files = source_files(component)
    if _known(entry) != {fingerprint(path) for path in files}:
        exported = ", ".join(source.name for source in entry.sources)
        told.append(f"exported from {exported}, this is {', '.join(path.name for path in files)}")
        told += _details(component, entry, sum(path.stat().st_size for path in files))
    return f"{component.stage}: {'; '.join(told)}" if told else None


def _details(component: Component, entry: StageEntry, size: int) -> Iterable[str]:
    """How another file differs, as far as that can be seen without reading it: not at all means its weights do."""
    layouts = {source.layout for source in entry.sources}
    before, now = (_width(each, component.parameters) for each in (sum(s.bytes for s in entry.sources), size))
    if component.variant != entry.variant:
        yield f"the {entry.variant} variant, this is the {component.variant} one"
    elif before and now and before != now:
        yield f"{before} weights, these are {now}"
    elif layouts == {component.layout}:
        yield "other weights, or of another dtype"
    if layouts != {component.layout}:
        yield f"layout {', '.join(sorted(layouts))}, this is {component.layout}"


def _scale(manifest: Manifest, component: Component) -> Iterable[str]:
    if isinstance(component.config, VQGANConfig) and component.config.scale_factor != manifest.vqgan_scale:
        yield f"scale {manifest.vqgan_scale:g}, this model's is {component.config.scale_factor:g}"


def _width(size: int, values: int) -> str | None:
    """How wide the weights in a file of `size` bytes are; None when it holds more than those, or another mixture."""
    return next((name for width, name in WIDTHS.items() if 0 <= size / (values * width) - 1 < SLACK), None)


def _loras(manifest: Manifest) -> Iterable[str]:
    if manifest.lora is not None:
        yield f"LoRAs are merged into the bundle ({', '.join(lora.name for lora in manifest.lora.loras)})"
