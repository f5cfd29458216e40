"""Exports one stage: its weights into the stage's folder, its graphs beside them, its entry in the manifest."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from ...schemas.block_types import QUANTISED
from ...schemas.callbacks import Say, StartFile
from ...schemas.config_json import to_json
from ...schemas.created_by import created_by
from ...schemas.dtypes import FP8
from ...schemas.errors import ExportError
from ...schemas.folded_biases import BIASES_NAME
from ...schemas.manifest import FileEntry, GraphEntry, SourceEntry, StageEntry
from ...schemas.passport import Passport, PassportSource, of_generations, passport_text
from ...schemas.precision import Target
from ...schemas.quantization import Quantization
from ...schemas.stages import Stage
from ...storage.content_digest import fill_in_digest
from ...storage.file_hashes import Hashing, describe_file
from ..checkpoints.component import Component
from ..onnx import GraphOptions, write_graphs
from ..passports import in_order, made_of
from .bundle_weights import StageWeights, add_weights, copy_weights, source_files, stored_dtype
from .derive_graph_options import derive_graph_options
from .export_options import ExportOptions
from .fold_biases import fold_biases
from .graph_files import beside_holes, check_graph, first_line, opset_of, port_entries, stamp
from .quantize_choice import QuantizationChoice
from .quantize_stage import quantize_stage

if TYPE_CHECKING:
    from ..lora.merge_plan import LoraPlan

FLOATS = ("F32", "BF16", "F16")

OnQuantized = Callable[[Stage, QuantizationChoice], object]
"""Called with a stage and what was measured and chosen for its Linears."""


@dataclass(frozen=True)
class ExportedStage:
    """A stage whose files are written; some of them may still be hashed in the background."""

    files: tuple[Path, ...]
    described: StageEntry  # its files have no SHA-256 yet

    def entry(self, root: Path, hashes: Hashing) -> StageEntry:
        """The stage's entry in the manifest, with hashes; waits until the stage's files are hashed."""
        files = tuple(describe_file(root, path, hashes.of(path)) for path in self.files)
        return self.described.model_copy(update={"files": files, "sources": self._sources(files)})

    def _sources(self, files: Sequence[FileEntry]) -> tuple[SourceEntry, ...]:
        """The model's files. A file's hash is known where the bundle holds the same bytes under the same name."""
        sources = self.described.sources
        if self.described.weights == "copy":
            return sources
        known = {file.path.rpartition("/")[2]: file.sha256 for file in files}
        return tuple(source.model_copy(update={"sha256": known.get(source.name)}) for source in sources)


@dataclass(frozen=True)
class StageExporter:
    """Exports stages into the bundle at `root`, with the options and the callbacks of one call of `export`."""

    root: Path
    options: ExportOptions
    hashes: Hashing
    loras: "LoraPlan | None"
    control: tuple[int, ...]  # blocks of the prior that ControlNets feed, if `options` ask for them
    start_file: StartFile | None
    say: Say
    on_quantized: OnQuantized

    def export(self, component: Component) -> ExportedStage:
        """Write the weights and the graphs of `component`. Raises a CascadeError for weights that cannot be used."""
        _require_floats(component)
        folder = self.root / component.stage
        folder.mkdir(parents=True)
        weights = self._weights(component, folder)
        for text in weights.notes:
            self.say(text)
        options, fit = derive_graph_options(
            component.config, weights.tensors, self.root, self.options, control=self.control, say=self.say
        )
        if self.options.quantizes(component.stage):
            weights, options, choice = quantize_stage(
                component.config, weights.tensors, options, self.options, self.start_file
            )
            self.on_quantized(component.stage, choice)
        if options.target is Target.ORT:
            weights = _with_biases(component, weights, options, folder)
        if self.options.hash:
            for path in weights.files:
                self.hashes.start(path)
        made = made_of(source_files(component), self.say)
        sources = tuple(_source(each, component) for each in made.values())
        models = write_graphs(component.config, weights.tensors, options)
        passport = self._passport(component, options, in_order(made.values()))
        for name, model in models.items():
            stamp(model, {**_facts(component, options, sources, name), "passport": passport}, version("cascadekit"))
        graphs = _save_graphs(models, self.root, folder, weights)
        for path in graphs:
            self.hashes.start(path)
        files = (*graphs, *weights.files)
        margins = fit.margins if fit else {}
        entry = StageEntry(
            variant=component.variant,
            config=to_json(component.config),
            precision=options.precision,
            target=options.target,
            quantization=options.quantization,
            exponents=dict(options.exponents),
            fp16_margins={name: round(bits, 2) for name, bits in margins.items() if math.isfinite(bits)},
            fp32_blocks=tuple(sorted(options.fp32_blocks)),
            control=options.control,
            weights=weights.placement,
            sources=sources,
            graphs={path.stem: graph for path, graph in graphs.items()},
            files=tuple(describe_file(self.root, path, None) for path in files),
        )
        return ExportedStage(files, entry)

    def _passport(self, component: Component, options: GraphOptions, sources: tuple[PassportSource, ...]) -> str:
        """The passport of the stage's graphs; the digest of each is filled in when its file is written."""
        merged = self.loras is not None and bool(self.loras.of(component.stage))
        passport = Passport(
            created_by=created_by(),
            layout=component.layout,
            precision=str(options.precision),
            quantization=None if options.quantization is Quantization.NONE else str(options.quantization),
            exponents=dict(options.exponents),
            loras=tuple(self.loras.entries) if self.loras and merged else (),
            sources=sources,
        )
        return passport_text(of_generations(passport))

    def _weights(self, component: Component, folder: Path) -> StageWeights:
        """Bring the weights into `folder`, with the LoRAs merged; weights that will change are copied."""
        changes = self.loras.of(component.stage) if self.loras else {}
        dtype = stored_dtype(component, self.options)
        if not changes:
            mode = "copy" if self.options.quantizes(component.stage) else self.options.weights
            return add_weights(component, folder, mode, dtype=dtype, start_file=self.start_file)
        from ..lora.changed_tensors import overwrite

        weights = copy_weights(component, folder, self.start_file, dtype=dtype)
        overwrite(weights.tensors, changes)
        return weights


def _with_biases(component: Component, weights: StageWeights, options: GraphOptions, folder: Path) -> StageWeights:
    """`weights` and the biases that are computed from them for ONNX Runtime."""
    path = folder / BIASES_NAME
    biases = fold_biases(component.config, weights.tensors, path, quantized=options.quantized)
    files = (*weights.files, path) if biases else weights.files
    return replace(weights, tensors={**weights.tensors, **biases}, files=files)


def _require_floats(component: Component) -> None:
    odd = [dtype for dtype in component.dtypes if dtype not in (*FLOATS, *FP8, *QUANTISED)]
    if odd:
        raise ExportError(
            f"{component.path}: the {component.stage} has weights of dtype {', '.join(odd)}; "
            f'graphs take {", ".join((*FLOATS, *FP8))}; convert the model with dtype="fp32" first'
        )


def _facts(
    component: Component, options: GraphOptions, sources: Sequence[SourceEntry], graph: str
) -> Mapping[str, str]:
    """Metadata of a graph; it is the same in every export of the same weights."""
    return {
        "stage": str(component.stage),
        "graph": graph,
        "variant": str(component.variant),
        "precision": str(options.precision),
        "target": str(options.target),
        "quantization": str(options.quantization),
        "source_fingerprints": " ".join(source.fingerprint for source in sources),
    }


def _save_graphs(
    models: Mapping[str, onnx.ModelProto], root: Path, folder: Path, weights: StageWeights
) -> dict[Path, GraphEntry]:
    """Write each graph into the stage's folder, after onnx has checked it beside holes of the weights' sizes."""
    entries = {}
    sizes = {path.name: path.stat().st_size for path in weights.files}
    with beside_holes(folder / ".check", sizes) as scratch:
        for name, model in models.items():
            path = folder / f"{name}.onnx"
            onnx.save_model(model, scratch / path.name)
            _check(scratch / path.name, f"{folder.name}/{path.name}")
            (scratch / path.name).rename(path)
            fill_in_digest(path)
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
        raise ExportError(f"{name}: refused by onnx: {first_line(error)}; this is a bug, report it") from error


def _source(file: PassportSource, component: Component) -> SourceEntry:
    return SourceEntry(
        name=file.name,
        bytes=file.bytes,
        fingerprint=file.fingerprint,
        sha256=None,
        layout=component.layout,
    )
