"""Finds the parts of a graph whose outputs differ from those of the reference.

The graph is cut at every value that corresponds to a module of the reference. Every part gets the reference's values
as inputs, so its error is its own. The error that a part may have is measured at the same place: the reference's module
computes on the same values in the graph's precision. Its products are quantised where those of the graph are.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from ...runtime.engines.onnxruntime import open_proto
from ...runtime.engines.protocol import Tensors
from ...runtime.text.tokenizer import ClipTokenizer
from ...schemas.config_json import from_json
from ...schemas.manifest import MAIN_GRAPH, StageEntry
from ...schemas.precision import Precision
from ...schemas.stages import Stage
from ...storage.bundle import Bundle
from ..reference_run import embed_prompts
from ..sample_inputs import hardest_input, make_inputs
from ..tolerances import COMPUTE_DTYPES, ROUNDOFF
from .bisection import FACTOR, Bisection, PartError
from .graph_cut import GIVEN, CutGraph, GraphPart
from .module_map import MappedValue, block_of, match

if TYPE_CHECKING:
    from ..reference.torch_engine import TorchEngine, TorchStage

# A part's error may always be so many times √channels times fp32's rounding. Runtimes add channels one after the other,
# which loses that much when one channel is far larger than the rest; PyTorch adds in pairs.
SUMMED = 2.0
QUANTIZED_FACTOR = 3.0  # FACTOR for parts with quantised products, whose floor has such products too
SLICE_BYTES = 1 << 30


def bisect_stage(
    bundle: Bundle, stage: Stage, reference: "TorchEngine", *, slice_bytes: int = SLICE_BYTES
) -> Bisection:
    """`bisect` on the hardest sample input of the stage. `reference` is a `TorchEngine` of cascadekit's modules.

    The input has true prompts where `reference` has a text encoder."""
    tokenizer = ClipTokenizer.open(bundle.tokenizer)
    embedded = embed_prompts(reference, tokenizer)
    sample = hardest_input(make_inputs(stage, bundle.entry(stage), tokenizer, embedded))
    with reference.load(stage) as runner:
        return bisect(bundle, stage, runner, sample.inputs, slice_bytes=slice_bytes)


def bisect(
    bundle: Bundle, stage: Stage, reference: "TorchStage", inputs: Tensors, *, slice_bytes: int = SLICE_BYTES
) -> Bisection:
    """Compare the stage's graph "model" with `reference` part by part, on `inputs`.

    The graph runs in slices, and the weights of one slice are loaded at a time. The reference's values of one slice
    take at most `slice_bytes`, unless one part needs more. About three copies are in memory: exact, in the graph's
    precision, and in the graph's layout. Graphs run in ONNX Runtime on the CPU. A graph in bf16 runs in fp32 and is
    rounded to bf16 after every operation. Raises EngineError when a part cannot be run."""
    entry = bundle.entry(stage)
    path = bundle.graph(stage, MAIN_GRAPH)
    run = _Run(CutGraph(path), reference, inputs, path.parent, entry=entry, stage=stage)
    slices = list(run.slices(slice_bytes))
    parts = [error for part in slices for error in run.compare(part)]
    depth = run.depth(slice_bytes)
    note = "the graph computes in bf16: run in fp32, rounded to bf16 after every operation" if run.graph.rounded else ""
    measured = tuple(replace(part, accumulated=depth.get(part.name)) for part in parts)
    return Bisection(stage, entry.precision, measured, slices=len(slices), note=note)


@dataclass(frozen=True)
class _Run:
    """One bisection: the graph, the reference it is compared with, and the inputs of both."""

    graph: CutGraph
    reference: "TorchStage"
    inputs: Tensors
    folder: Path  # of the graph and its weights
    entry: StageEntry
    stage: Stage

    @cached_property
    def values(self) -> dict[str, MappedValue]:
        """The values to compare by name, in the order the graph computes them."""
        shapes = self.reference.shapes(self.inputs)
        found = match(shapes, self.graph.dims, from_json(self.stage, self.entry.config), self.entry.exponents)
        return {value.name: value for value in sorted(found, key=lambda value: self.graph.order[value.name])}

    def nbytes(self, names: Iterable[str]) -> int:
        return sum(self.values[name].nbytes for name in names)

    def slices(self, most: int) -> Iterator[GraphPart]:
        """Parts of the graph in the order they run, each with at most `most` bytes of values, inputs included."""
        cuts = set(self.values) - set(self.graph.ports)
        run: list[str] = []
        held: set[str] = set()
        for name in self.values:
            names = {name, *self.graph.given_for(name, cuts)}
            if run and self.nbytes(held | names) > most:
                yield self.graph.part(run, cuts)
                run, held = [], set()
            run.append(name)
            held |= names
        if run:
            yield self.graph.part(run, cuts)

    def compare(self, part: GraphPart) -> Iterator[PartError]:
        """The errors of the part's outputs when its inputs are the reference's values."""
        precision = self.entry.precision
        exact = self.reference.watch(self.inputs, {*part.outputs, *part.given}, compute="float64")
        given = {name: exact[name] for name in part.given}
        rough = self.reference.watch(self.inputs, part.outputs, given, COMPUTE_DTYPES[precision])
        quantization = str(self.entry.quantization)
        coarse = self.reference.watch(self.inputs, part.quantized, given, quantization) if part.quantized else {}
        found = self._run_part(part, given)
        largest = {name: float(np.abs(value).max(initial=0)) for name, value in exact.items()}
        for name in part.outputs:
            value = self.values[name]
            expected = value.rows(value.to_graph(exact[name]))
            own, worst, nonfinite = _errors(value.rows(found[name]), expected)
            _, floor, broken = _errors(value.rows(value.to_graph(rough[name])), expected)
            limit = FACTOR * max(0.0 if broken else floor, ROUNDOFF[precision])
            limit = max(limit, SUMMED * expected.shape[1] ** 0.5 * ROUNDOFF[Precision.FP32])
            if name in part.quantized:
                _, quantized, _ = _errors(value.rows(value.to_graph(coarse[name])), expected)
                limit = max(limit, QUANTIZED_FACTOR * quantized)
            yield PartError(
                name,
                relative_l2=own,
                worst_channel=worst,
                floor=np.inf if broken else floor,
                limit=limit,
                max_abs=largest[name],
                nonfinite=nonfinite,
                inputs={given_name: largest[given_name] for given_name in part.reads[name]},
                nodes=part.nodes[name],
            )

    def _run_part(self, part: GraphPart, given: Tensors) -> dict[str, NDArray[Any]]:
        session = open_proto(part.model, self.folder)
        fed = {name: self.inputs[name] for name in part.inputs}
        for name in part.given:
            half = self.graph.types[name] == TensorProto.FLOAT16
            with np.errstate(over="ignore"):
                value = self.values[name].to_graph(given[name])
                fed[f"{name}{GIVEN}"] = value.astype(np.float16 if half else np.float32)
        return dict(zip(part.outputs, session.run(list(part.outputs), fed), strict=True))

    def depth(self, most: int) -> dict[str, float]:
        """Relative L2 after every block and at the outputs when the whole graph runs, by the name of the value.

        At most `most` bytes of values are held at a time, unless one value needs more."""
        names = [name for name in self.values if not block_of(name)[1] or name in self.graph.ports]
        found: dict[str, float] = {}
        while names:
            run = [name for at, name in enumerate(names) if at == 0 or self.nbytes(names[: at + 1]) <= most]
            names = names[len(run) :]
            exact = self.reference.watch(self.inputs, run, compute="float64")
            session = open_proto(self.graph.marked(run), self.folder)
            needed = {port.name for port in session.get_inputs()}
            outputs = session.run(run, {name: array for name, array in self.inputs.items() if name in needed})
            for name, output in zip(run, outputs, strict=True):
                value = self.values[name]
                found[name], _, nonfinite = _errors(value.rows(output), value.rows(value.to_graph(exact[name])))
                if nonfinite:
                    found[name] = np.inf
        return found


def _errors(found: NDArray[np.float64], expected: NDArray[np.float64]) -> tuple[float, float, int]:
    """Errors of rows of channels: relative L2, the worst channel's, and the number of values that are not finite.

    A channel's error is relative to the channel, or to the root mean square of all channels if that is larger."""
    wrong = ~np.isfinite(found)
    error = np.linalg.norm(np.where(wrong, 0, found) - expected, axis=0)
    size = np.linalg.norm(expected, axis=0)
    total = float(np.linalg.norm(size))
    usual = total / np.sqrt(max(1, len(size)))
    if total == 0:
        return (0.0, 0.0, 0) if not error.any() else (np.inf, np.inf, int(wrong.sum()))
    return float(np.linalg.norm(error)) / total, float((error / np.maximum(size, usual)).max()), int(wrong.sum())
