"""Exports a model as a bundle: for each stage ONNX graphs whose weights stay in safetensors files."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from ...schemas.bundle import (
    MANIFEST_NAME,
    FileEntry,
    GraphEntry,
    LoraState,
    Manifest,
    SourceEntry,
    StageEntry,
    to_text,
)
from ...schemas.config_json import to_json
from ...schemas.errors import ExportError, LayoutError, UsageError
from ...schemas.infer import infer_config
from ...schemas.limits import VQGAN_SCALES
from ...schemas.quantization import RULES
from ...schemas.stages import NetworkConfig, Stage, TextEncoderConfig, Variant, VQGANConfig, variant_of
from ...storage.bundle import require_utf8
from ...storage.cast import FP8
from ...storage.fingerprints import describe_file, fingerprint
from ...storage.hashing import Hashing
from ...storage.outputs import staged_output
from ...storage.safetensors_header import TensorRange
from ..checkpoints.identify import Component, find_problems
from ..checkpoints.open_model import Model, open_model
from ..checkpoints.tokenizer_files import check_tokenizer, write_tokenizer
from ..onnx import GraphOptions, Weight, write_graphs
from .bundle_weights import Placed, StartFile, Wish, copy_weights, place_weights, source_files
from .graph_files import beside_holes, check_graph, opset_of, port_entries, stamp
from .derive_graph_options import GraphWishes, options_for
from .quantize_stage import Quantize, quantize_stage, scheme_for

if TYPE_CHECKING:
    from ..lora.changes import LoraPlan
    from ..lora.overwrite import Changes

FLOATS = ("F32", "BF16", "F16")

DEFAULT_SIDE = {Variant.TINY: 256}  # any other cascade was trained at 1024

Say = Callable[[str], object]

PLAIN = GraphWishes()


@dataclass(frozen=True)
class _Options:
    """What holds for every stage of an export."""

    weights: Wish
    graphs: GraphWishes
    hashes: Hashing
    hash_weights: bool
    plan: "LoraPlan | None"
    start_file: StartFile | None
    say: Say
    quantize: Quantize | None

    def stored_as(self, component: Component) -> str | None:
        """The dtype to store a stage's weights in; links keep what the model has unless a storage was asked for.

        Graphs take no fp8: it becomes the narrowest dtype that holds every value exactly."""
        linked = self.weights == "link" and self.graphs.storage is None
        wished = None if linked else self.graphs.stored_as(component.stage)
        if wished is not None or not set(component.dtypes) & set(FP8):
            return wished
        return "F32" if any(tensor.scale for tensor in component.tensors.values()) else "BF16"

    def changes(self, stage: Stage) -> "Changes":
        """What LoRAs change about the weights of `stage`."""
        return self.plan.of(stage) if self.plan else {}


def export(
    model: Model | str | Path,
    output: str | Path,
    *,
    stages: Sequence[Stage] = (),
    weights: Wish = "auto",
    graphs: GraphWishes = PLAIN,
    quantize: Quantize | None = None,
    hash_weights: bool = True,
    loras: Sequence[tuple[str | Path, float]] = (),
    vqgan_scale: float | None = None,
    force: bool = False,
    start_file: StartFile | None = None,
    say: Say = lambda text: None,
) -> Manifest:
    """Write the bundle of `model` (opened, or the path of one) at `output`: cascade.json, and a folder for each stage
    (all there are, or `stages`).

    `weights` is "auto" (clones of the model's files where the file system clones, else copies), "copy", or "link":
    hard links where it does not clone, which no other program opens as ONNX, and the model's files must never change in
    place then. Of every file the SHA-256 is recorded, of weights unless `hash_weights` is off. `loras` are files with
    their strengths, merged into the weights of the stages they are for, which are copied then. `vqgan_scale`
    overrides the scale that the model's layout implies, from 0.001 to 1000. `graphs` says how graphs compute; by
    default in fp32, and 16-bit weights stay 16-bit on disk; `quantize` how Linears are quantised where they bear it,
    which takes copied weights. `say` hears what a user should know.

    Raises a CascadeError, and leaves nothing behind, when a stage is missing or damaged or the output unwritable."""
    output = Path(output)
    require_utf8(output)
    model = model if isinstance(model, Model) else open_model([model])
    chosen = list(stages) or [stage for stage in Stage if stage in model.components]
    if not chosen:
        raise UsageError(f"nothing to export: the model has none of {', '.join(Stage)}")
    graphs.require_sense(chosen)
    least, most = VQGAN_SCALES
    if vqgan_scale is not None and not least <= vqgan_scale <= most:
        raise UsageError(f"--vqgan-scale {vqgan_scale:g}: expected a number from {least:g} to {most:g}, such as 0.3764")
    if quantize and weights == "link":
        raise UsageError("quantised weights are not those of the model's files; use --weights auto or copy")
    if quantize:
        scheme_for(quantize.kind, graphs.target)  # what does not go together fails before anything is written
    components = {stage: _scaled(_sound(model, stage), vqgan_scale) for stage in chosen}
    for component in components.values():
        for path in source_files(component):
            require_utf8(path.relative_to(path.parent))  # graphs name their weights as the model does
    tokenizer = check_tokenizer(model.tokenizer, _rows(components))
    for text in tokenizer.notes if tokenizer else ():
        say(text)
    plan = _plan(components, loras, weights, say)
    sources = [*model.sources, *(path for component in components.values() for path in source_files(component))]
    with (
        staged_output(
            output, force=force, sources=[*sources, *(path for path, _ in loras)], files=[MANIFEST_NAME], say=say
        ) as staged,
        Hashing() as hashes,
    ):
        options = _Options(weights, graphs, hashes, hash_weights, plan, start_file, say, quantize)
        staged.mkdir()
        words = write_tokenizer(tokenizer, staged)  # first: calibration reads prompts with it
        if words:
            hashes.start(words)
        exported = {stage: _export_stage(component, staged, options) for stage, component in components.items()}
        manifest = Manifest(
            created_by=f"cascadekit {version('cascadekit')}",
            default_size=_default_size(components),
            vqgan_scale=_vqgan_scale(components),
            tokenizer=words.relative_to(staged).as_posix() if words else None,
            stages={stage: done.entry(staged, hashes) for stage, done in exported.items()},
            files=(describe_file(staged, words, hashes.of(words)),) if words else (),
            lora=LoraState(loras=tuple(options.plan.entries), kept=()) if options.plan else None,
        )
        (staged / MANIFEST_NAME).write_text(to_text(manifest), encoding="utf-8")
    return manifest


@dataclass(frozen=True)
class _Exported:
    """A stage whose files are written, and perhaps not hashed yet."""

    placed: Placed
    sources: tuple[SourceEntry, ...]
    files: tuple[Path, ...]
    described: StageEntry  # with files that lack their SHA-256

    def entry(self, root: Path, hashes: Hashing) -> StageEntry:
        """What the manifest says of it; waits for its files to be hashed."""
        files = tuple(describe_file(root, path, hashes.of(path)) for path in self.files)
        return self.described.model_copy(update={"files": files, "sources": self._sources(files)})

    def _sources(self, files: Sequence[FileEntry]) -> tuple[SourceEntry, ...]:
        """Of a source that is in the bundle as it is, the hash is known."""
        if self.placed.how == "copy":
            return self.sources
        known = {file.path.rpartition("/")[2]: file.sha256 for file in files}
        return tuple(source.model_copy(update={"sha256": known.get(source.name)}) for source in self.sources)


def _export_stage(component: Component, root: Path, options: _Options) -> _Exported:
    _require_floats(component)
    folder = root / component.stage
    folder.mkdir(parents=True)
    placed = _place(component, folder, options)
    for text in placed.notes:
        options.say(text)
    chosen, plan = options_for(component.config, _weights(placed.tensors), root, options.graphs, options.say)
    if options.quantize:
        placed, chosen = _quantized(component, placed, options.quantize, chosen, options)
    if options.hash_weights:
        for path in placed.files:
            options.hashes.start(path)
    sources = tuple(_source(path, component) for path in source_files(component))
    models = write_graphs(component.config, _weights(placed.tensors), chosen)
    for name, model in models.items():
        stamp(model, _facts(component, chosen, sources, name), version("cascadekit"))
    graphs = _save_graphs(models, root, folder, placed)
    for path in graphs:
        options.hashes.start(path)
    files = (*graphs, *placed.files)
    entry = StageEntry(
        variant=component.variant,
        config=to_json(component.config),
        precision=chosen.precision,
        target=chosen.target,
        quantization=chosen.quantization,
        exponents=dict(chosen.exponents),
        fp16_margins={n: round(bits, 2) for n, bits in plan.margins.items() if math.isfinite(bits)} if plan else {},
        fp32_blocks=tuple(sorted(chosen.fp32_blocks)),
        control=chosen.control,
        weights=placed.how,
        sources=sources,
        graphs={path.stem: graph for path, graph in graphs.items()},
        files=tuple(describe_file(root, path, None) for path in files),
    )
    return _Exported(placed, sources, files, entry)


def _facts(
    component: Component, options: GraphOptions, sources: Sequence[SourceEntry], graph: str
) -> Mapping[str, str]:
    """What a graph is to say of itself, the same in every export of the same weights."""
    return {
        "stage": str(component.stage),
        "graph": graph,
        "variant": str(component.variant),
        "precision": str(options.precision),
        "target": str(options.target),
        "quantization": str(options.quantization),
        "source_fingerprints": " ".join(source.fingerprint for source in sources),
    }


def _quantized(
    component: Component, placed: Placed, wish: Quantize, graphs: GraphOptions, options: _Options
) -> tuple[Placed, GraphOptions]:
    """The weights quantised where they bear it, and the options to write their graphs with."""
    if placed.how != "copy":  # of a stage that has nothing to quantise
        return placed, graphs
    stage = quantize_stage(component.config, placed.tensors, wish, graphs, options.start_file)
    paths = sorted({tensor.path for tensor in stage.tensors.values()})
    return Placed("copy", stage.tensors, tuple(paths)), stage.options


def _place(component: Component, folder: Path, options: _Options) -> Placed:
    changes, dtype = options.changes(component.stage), options.stored_as(component)
    wish: Wish = "copy" if options.quantize and component.stage in RULES else options.weights
    if not changes:
        return place_weights(component, folder, wish, dtype=dtype, start_file=options.start_file)
    from ..lora.overwrite import overwrite

    placed = copy_weights(component, folder, options.start_file, dtype=dtype)
    overwrite(placed.tensors, changes)
    return placed


def _save_graphs(
    models: Mapping[str, onnx.ModelProto], root: Path, folder: Path, placed: Placed
) -> dict[Path, GraphEntry]:
    """Write each graph into the stage's folder, once onnx has checked it beside holes in place of the weights."""
    entries = {}
    sizes = {path.name: path.stat().st_size for path in placed.files}
    with beside_holes(folder / ".check", sizes) as scratch:
        for name, model in models.items():
            path = folder / f"{name}.onnx"
            onnx.save_model(model, scratch / path.name)
            _check(scratch / path.name, f"{folder.name}/{path.name}")
            (scratch / path.name).rename(path)
            entries[path] = GraphEntry(
                path=path.relative_to(root).as_posix(),
                opset=opset_of(model),
                inputs=port_entries(model.graph.input),
                outputs=port_entries(model.graph.output),
            )
    return entries


def _check(path: Path, name: str) -> None:
    try:
        check_graph(path)
    except Exception as error:  # onnx has classes of its own, and raises plain RuntimeErrors from C++
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(f"{name}: refused by onnx: {first}; this is a bug, report it") from error


def _weights(tensors: Mapping[str, TensorRange]) -> dict[str, Weight]:
    """Where each tensor lies, seen from the folder its file is in."""
    return {name: Weight(t.dtype, t.shape, t.path.name, t.offset, t.nbytes) for name, t in tensors.items()}


def _source(path: Path, component: Component) -> SourceEntry:
    return SourceEntry(
        name=path.name,
        bytes=path.stat().st_size,
        fingerprint=fingerprint(path),
        sha256=None,
        layout=component.layout,
    )


def _plan(
    components: Mapping[Stage, Component], loras: Sequence[tuple[str | Path, float]], weights: Wish, say: Say
) -> "LoraPlan | None":
    """What the LoRAs are to change; None without any."""
    if not loras:
        return None
    from ..lora.changes import plan_loras

    paths, strengths = [path for path, _ in loras], [strength for _, strength in loras]
    plan = plan_loras("the model", components, paths, strengths=strengths)
    if weights == "link":
        raise UsageError(
            f"--weights link shares the model's weights, and a LoRA changes those of the {', '.join(plan.stages)}; "
            "use --weights auto, which copies what changes"
        )
    for text in (*plan.notes, *(f"not applied: {part}" for part in plan.unapplied)):
        say(text)
    return plan


def _sound(model: Model, stage: Stage) -> Component:
    """The component of `stage`, whole. Raises LayoutError, also naming a config.json that is another variant's."""
    component = model.components.get(stage)
    if component and component.problems:
        try:
            found = infer_config(stage, {name: tensor.shape for name, tensor in component.tensors.items()})
        except LayoutError:
            found = component.config
        if variant_of(found) != component.variant and not find_problems(found, component.tensors):
            raise LayoutError(
                f"{component.path}: its config.json describes the {component.variant} {stage}, the file holds the "
                f"{variant_of(found)} one; put the config.json there that belongs to the file"
            )
    return model.component(stage)


def _require_floats(component: Component) -> None:
    odd = [dtype for dtype in component.dtypes if dtype not in (*FLOATS, *FP8)]
    if odd:
        raise ExportError(
            f"{component.path}: the {component.stage} has weights of dtype {', '.join(odd)}; "
            f"graphs take {', '.join((*FLOATS, *FP8))}"
        )


def _scaled(component: Component, scale: float | None) -> Component:
    """With another scale, where it is a vqgan and `scale` is given. Raises ExportError for a scale that no image
    survives."""
    if not isinstance(component.config, VQGANConfig):
        return component
    least, most = VQGAN_SCALES
    config = component.config if scale is None else replace(component.config, scale_factor=scale)
    if not least <= config.scale_factor <= most:
        raise ExportError(
            f"{component.path}: its config.json says scale_factor {config.scale_factor:g}; expected a number from "
            f"{least:g} to {most:g}; give the right one with --vqgan-scale (diffusers 0.3764, original 0.43)"
        )
    return replace(component, config=config)


def _vqgan_scale(components: dict[Stage, Component]) -> float | None:
    config: NetworkConfig | None = components[Stage.VQGAN].config if Stage.VQGAN in components else None
    return config.scale_factor if isinstance(config, VQGANConfig) else None


def _default_size(components: dict[Stage, Component]) -> tuple[int, int]:
    sides = [DEFAULT_SIDE.get(component.variant, 1024) for component in components.values()]
    return min(sides), min(sides)


def _rows(components: Mapping[Stage, Component]) -> int | None:
    """How many tokens the text encoder has a row for; None without one."""
    config: NetworkConfig | None = components[Stage.TEXT_ENCODER].config if Stage.TEXT_ENCODER in components else None
    return config.vocab_size if isinstance(config, TextEncoderConfig) else None
