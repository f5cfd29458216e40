"""Exports a model as a bundle: for each stage ONNX graphs whose weights stay in safetensors files."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from ..runtime.bundle import require_utf8
from ..runtime.integrity import describe_file, fingerprint, sha256_of
from ..schemas.bundle import MANIFEST_NAME, GraphEntry, LoraState, Manifest, SourceEntry, StageEntry, to_text
from ..schemas.config_json import to_json
from ..schemas.errors import ExportError, LayoutError, UsageError
from ..schemas.infer import infer_config
from ..schemas.quantization import RULES
from ..schemas.stages import NetworkConfig, Stage, Variant, VQGANConfig, variant_of
from .graph_files import beside_holes, check_graph, opset_of, port_entries
from .identify import Component, find_problems
from .model import Model, open_model
from .onnx import GraphOptions, Weight, write_graphs
from .outputs import staged_output
from .placing import Placed, StartFile, Wish, copy_weights, place_weights, recorded_sha256, source_files
from .quantize_export import Quantize, quantize_stage, scheme_for
from .safetensors_file import TensorRange
from .stage_graphs import GraphWishes, options_for

if TYPE_CHECKING:
    from .lora.overwrite import Changes
    from .lora.plan import LoraPlan

FLOATS = ("F32", "BF16", "F16")

DEFAULT_SIDE = {Variant.TINY: 256}  # any other cascade was trained at 1024

Say = Callable[[str], object]

PLAIN = GraphWishes()


@dataclass(frozen=True)
class _Options:
    """What holds for every stage of an export."""

    weights: Wish
    graphs: GraphWishes
    hashed: bool
    plan: "LoraPlan | None"
    start_file: StartFile | None
    say: Say
    quantize: Quantize | None

    def stored_as(self, stage: Stage) -> str | None:
        """The dtype to store a stage's weights in; links keep what the model has unless a storage was asked for."""
        linked = self.weights == "link" and self.graphs.storage is None
        return None if linked else self.graphs.stored_as(stage)

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
    hash_weights: bool = False,
    loras: Sequence[tuple[str | Path, float]] = (),
    vqgan_scale: float | None = None,
    force: bool = False,
    start_file: StartFile | None = None,
    say: Say = lambda text: None,
) -> Manifest:
    """Write the bundle of `model` (opened, or the path of one) at `output`: cascade.json, and a folder for each stage
    (all there are, or `stages`).

    `weights` is "copy" (the bundle has its own file), "link" (it shares the model's files: clones of them where the
    file system clones, else hard links, and then the files must never change in place), or "auto": link where
    that is possible, else copy. Weights are hashed if `hash_weights`, small copies always. `loras` are files
    with their strengths, merged into the weights of the stages they are for, which are copied then. `vqgan_scale`
    overrides the scale that the model's layout implies. `graphs` says how graphs compute; by default in fp32, and
    16-bit weights stay 16-bit on disk; `quantize` how Linears are quantised where they bear it, which takes copied
    weights. `say` hears what a user should know.

    Raises a CascadeError, and leaves nothing behind, when a stage is missing or damaged or the output unwritable."""
    output = Path(output)
    require_utf8(output)
    model = model if isinstance(model, Model) else open_model([model])
    chosen = list(stages) or [stage for stage in Stage if stage in model.components]
    if not chosen:
        raise UsageError(f"nothing to export: the model has none of {', '.join(Stage)}")
    graphs.require_sense(chosen)
    if quantize and weights == "link":
        raise UsageError("quantised weights are not those of the model's files; use --weights auto or copy")
    if quantize:
        scheme_for(quantize.kind, graphs.target)  # what does not go together fails before anything is written
    components = {stage: _scaled(_sound(model, stage), vqgan_scale) for stage in chosen}
    for component in components.values():
        for path in source_files(component):
            require_utf8(path.relative_to(path.parent))  # graphs name their weights as the model does
    options = _Options(weights, graphs, hash_weights, _plan(components, loras, weights, say), start_file, say, quantize)
    with staged_output(output, force=force) as staged:
        staged.mkdir()
        entries = {stage: _export_stage(component, staged, options) for stage, component in components.items()}
        manifest = Manifest(
            created_by=f"cascadekit {version('cascadekit')}",
            default_size=_default_size(components),
            vqgan_scale=_vqgan_scale(components),
            tokenizer=_copy_tokenizer(model, staged),
            stages=entries,
            lora=LoraState(loras=tuple(options.plan.entries), kept=()) if options.plan else None,
        )
        (staged / MANIFEST_NAME).write_text(to_text(manifest), encoding="utf-8")
    return manifest


def _export_stage(component: Component, root: Path, options: _Options) -> StageEntry:
    _require_floats(component)
    folder = root / component.stage
    folder.mkdir(parents=True)
    placed = _place(component, folder, options)
    chosen, plan = options_for(component.config, _weights(placed.tensors), root, options.graphs, options.say)
    if options.quantize:
        placed, chosen = _quantized(component, placed, options.quantize, chosen, options)
    models = write_graphs(component.config, _weights(placed.tensors), chosen)
    paths = _save_graphs(models, root, folder, placed)
    files = {**{path: sha256_of(path) for path in paths}, **placed.files}
    sources = source_files(component)
    return StageEntry(
        variant=component.variant,
        config=to_json(component.config),
        precision=chosen.precision,
        target=chosen.target,
        quantization=chosen.quantization,
        exponents=dict(chosen.exponents),
        fp16_margins={name: round(bits, 2) for name, bits in plan.margins.items()} if plan else {},
        fp32_blocks=tuple(sorted(chosen.fp32_blocks)),
        control=chosen.control,
        weights=placed.how,
        sources=tuple(_source(path, component, placed.files.get(folder / path.name)) for path in sources),
        graphs={path.stem: graph for path, graph in paths.items()},
        files=tuple(describe_file(root, path, sha256) for path, sha256 in files.items()),
    )


def _quantized(
    component: Component, placed: Placed, wish: Quantize, graphs: GraphOptions, options: _Options
) -> tuple[Placed, GraphOptions]:
    """The weights quantised where they bear it, and the options to write their graphs with."""
    if placed.how != "copy":  # of a stage that has nothing to quantise
        return placed, graphs
    stage = quantize_stage(component.config, placed.tensors, wish, graphs, options.start_file)
    paths = sorted({tensor.path for tensor in stage.tensors.values()})
    return Placed("copy", stage.tensors, {path: recorded_sha256(path, options.hashed) for path in paths}), stage.options


def _place(component: Component, folder: Path, options: _Options) -> Placed:
    changes, dtype = options.changes(component.stage), options.stored_as(component.stage)
    wish: Wish = "copy" if options.quantize and component.stage in RULES else options.weights
    if not changes:
        return place_weights(component, folder, wish, dtype=dtype, hashed=options.hashed, start_file=options.start_file)
    from .lora.overwrite import overwrite

    placed = copy_weights(component, folder, options.start_file, dtype=dtype)
    overwrite(placed.tensors, changes)
    return replace(placed, files={path: recorded_sha256(path, options.hashed) for path in placed.files})


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


def _source(path: Path, component: Component, sha256: str | None) -> SourceEntry:
    return SourceEntry(
        name=path.name,
        bytes=path.stat().st_size,
        fingerprint=fingerprint(path),
        sha256=sha256,
        layout=component.layout,
    )


def _plan(
    components: Mapping[Stage, Component], loras: Sequence[tuple[str | Path, float]], weights: Wish, say: Say
) -> "LoraPlan | None":
    """What the LoRAs are to change; None without any."""
    if not loras:
        return None
    from .lora.plan import plan_loras

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
    odd = [dtype for dtype in component.dtypes if dtype not in FLOATS]
    if odd:
        raise ExportError(
            f"{component.path}: the {component.stage} has weights of dtype {', '.join(odd)}; "
            f"graphs take {', '.join(FLOATS)}"
        )


def _scaled(component: Component, scale: float | None) -> Component:
    if scale is None or not isinstance(component.config, VQGANConfig):
        return component
    return replace(component, config=replace(component.config, scale_factor=scale))


def _vqgan_scale(components: dict[Stage, Component]) -> float | None:
    config: NetworkConfig | None = components[Stage.VQGAN].config if Stage.VQGAN in components else None
    return config.scale_factor if isinstance(config, VQGANConfig) else None


def _default_size(components: dict[Stage, Component]) -> tuple[int, int]:
    sides = [DEFAULT_SIDE.get(component.variant, 1024) for component in components.values()]
    return min(sides), min(sides)


def _copy_tokenizer(model: Model, folder: Path) -> str | None:
    """The model's own tokenizer goes along, as it may know more words; otherwise the package's is used."""
    source = model.tokenizer / "tokenizer.json" if model.tokenizer else None
    if source is None or not source.is_file():
        return None
    (folder / "tokenizer").mkdir()
    shutil.copyfile(source, folder / "tokenizer" / "tokenizer.json")
    return "tokenizer/tokenizer.json"
