"""Finds the part of a graph that is not what the reference is.

The graph is cut at every value that stands for a module of the reference, and every part is given the reference's
values: what it gets wrong is its own. How much it may get wrong is measured at the same place: the reference's modules
compute in the graph's precision, given the same values, and with products quantised as the graph's are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from ...runtime.engines.base import Engine, Tensors
from ...runtime.engines.onnxruntime import open_proto
from ...runtime.text.tokenizer import ClipTokenizer
from ...schemas.bundle import MAIN_GRAPH, StageEntry
from ...schemas.config_json import from_json
from ...schemas.precision import FP16_MAX, Precision
from ...schemas.stages import Stage
from ...storage.bundle import Bundle
from ..reference_run import embedded_by
from ..sample_inputs import cases_of, odd_case
from ..tolerances import COMPUTES, ROUNDOFF
from .graph_cut import GIVEN, CutGraph, Part
from .module_map import Point, block_of, match

FACTOR = 8.0  # a part's own error to that of the reference's module in the same precision
# A part may as well be off by so many times √channels of fp32's rounding: what sums over channels lose when they are
# taken one after the other and one channel has nearly all. PyTorch sums in pairs.
SUMMED = 2.0
MOST = {Precision.FP32: np.inf, Precision.FP16: FP16_MAX, Precision.BF16: np.inf}
QUANTIZED_FACTOR = 3.0  # the same of parts with quantised products, to the reference's with such products
SLICE_BYTES = 1 << 30
SHOWN = 5  # faulty parts; what comes after an overflow is wrong as well

Progress = Callable[[str], object]


class WatchedStage(Protocol):
    """A reference whose modules can be watched: `engines.torch.TorchStage`."""

    def watch(
        self, inputs: Tensors, wanted: Any, given: Tensors = ..., compute: str | None = None
    ) -> dict[str, NDArray[Any]]: ...
    def shapes(self, inputs: Tensors) -> dict[str, tuple[int, ...]]: ...


@dataclass(frozen=True)
class PointError:
    """How wrong one part of a graph is, by itself and with all that ran before it."""

    name: str  # the module's path; "@1" after it for a second pass
    relative_l2: float  # of the part, given the reference's values
    worst_channel: float  # of that, the channel that is worst, relative to it or to a usual one
    floor: float  # the same of the reference's own module in the graph's precision; infinite where that overflows
    limit: float  # worst_channel above this is a fault
    max_abs: float  # of the reference's value
    nonfinite: int  # values that are NaN or infinite
    inputs: dict[str, float] = field(default_factory=dict)  # what the part is given: largest magnitudes, by name
    nodes: tuple[str, ...] = ()  # of the graph, that the part consists of
    accumulated: float | None = None  # relative L2 in the whole graph; None where that was not measured

    @property
    def faulty(self) -> bool:
        return self.nonfinite > 0 or not self.worst_channel <= self.limit

    @property
    def held_to(self) -> float:
        """The floor, or what values of the precision and sums in it are rounded by where that is more."""
        return self.limit / FACTOR

    @property
    def block(self) -> str:
        return block_of(self.name)[0]

    @property
    def label(self) -> str:
        block, rest = block_of(self.name)
        return f"{block} {rest}".strip()


@dataclass(frozen=True)
class Bisection:
    """All parts of a stage's graph in the order they run; true when none is faulty."""

    stage: Stage
    precision: Precision
    points: tuple[PointError, ...]
    depth: tuple[PointError, ...]  # those of `points` with `accumulated`
    slices: int
    note: str = ""

    def __bool__(self) -> bool:
        return not self.faulty

    @property
    def faulty(self) -> tuple[PointError, ...]:
        return tuple(point for point in self.points if point.faulty)

    @property
    def first(self) -> PointError | None:
        return next(iter(self.faulty), None)

    @property
    def suspects(self) -> tuple[str, ...]:
        """The nodes of the first faulty part that no healthy part has; of these the ones that all faulty parts share,
        if there are any."""
        if self.first is None:
            return ()
        healthy = {node for point in self.points if not point.faulty for node in point.nodes}
        own = [node for node in self.first.nodes if node not in healthy]
        shared = [node for node in own if all(node in point.nodes for point in self.faulty)]
        return tuple(shared or own)

    def described(self) -> list[str]:
        """What was found, a line for each of the first faults."""
        if not self.faulty:
            return [f"{self.stage}: {len(self.points)} parts compared, none is faulty"]
        lines = [f"{self.stage}: {self._line(point)}" for point in self.faulty[:SHOWN]]
        if len(self.faulty) > SHOWN:
            lines.append(f"{self.stage}: and {len(self.faulty) - SHOWN} more parts")
        suspects = self.suspects
        more = f" and {len(suspects) - 3} more" if len(suspects) > 3 else ""
        return [*lines, f"{self.stage}: look at the nodes {', '.join(suspects[:3])}{more}"]

    def _line(self, point: PointError) -> str:
        line = f"{point.label}: relative L2 {point.relative_l2:.1e} by itself, worst channel {point.worst_channel:.1e}"
        usual = f"has {point.floor:.1e}" if np.isfinite(point.floor) else "overflows"
        line += f" where the reference in {self.precision} {usual}"
        before = [other.accumulated for other in self.depth if self._place(other) < self._place(point)]
        if before and before[-1] is not None:
            line += f"; {before[-1]:.1e} had gathered before"
        most = MOST[self.precision]
        for name, largest in {**point.inputs, point.name: point.max_abs}.items():
            if largest > most:
                line += f"; max |{name}| {largest:,.0f} > {most:,.0f} ({self.precision})".replace(",", " ")
        if point.nonfinite:
            line += f"; {point.nonfinite} values are NaN or infinite"
        ranges = ", ".join(f"{name} {largest:.3g}" for name, largest in point.inputs.items())
        return f"{line}; largest inputs: {ranges or 'those of the stage'}"

    def _place(self, point: PointError) -> int:
        return self.points.index(point)

    def to_json(self) -> dict[str, Any]:
        first = self.first
        return {
            "stage": str(self.stage),
            "precision": str(self.precision),
            "passed": bool(self),
            "first": first.name if first else None,
            "suspects": list(self.suspects),
            "note": self.note,
            "slices": self.slices,
            "points": [
                {
                    "name": p.name,
                    "block": p.block,
                    "faulty": p.faulty,
                    "relative_l2": _plain(p.relative_l2),
                    "worst_channel": _plain(p.worst_channel),
                    "floor": _plain(p.floor),
                    "limit": _plain(p.limit),
                    "max_abs": _plain(p.max_abs),
                    "nonfinite": p.nonfinite,
                    "inputs": {name: _plain(largest) for name, largest in p.inputs.items()},
                    "accumulated": _plain(p.accumulated),
                }
                for p in self.points
            ],
        }


def _plain(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None


def bisect_stage(
    bundle: Bundle,
    stage: Stage,
    reference: Engine,
    tokenizer: ClipTokenizer,
    *,
    slice_bytes: int = SLICE_BYTES,
    progress: Progress = lambda what: None,
) -> Bisection:
    """`bisect` on the case of the stage where most can go wrong, with true prompts where `reference`, which is a
    `TorchEngine` of cascadekit's modules, has a text encoder."""
    entry = bundle.entry(stage)
    case = odd_case(cases_of(stage, entry, tokenizer, embedded_by(reference, tokenizer)))
    runner: Any
    with reference.load(stage) as runner:
        return bisect(bundle, stage, runner, case.inputs, slice_bytes=slice_bytes, progress=progress)


def bisect(
    bundle: Bundle,
    stage: Stage,
    reference: WatchedStage,
    inputs: Tensors,
    *,
    slice_bytes: int = SLICE_BYTES,
    progress: Progress = lambda what: None,
) -> Bisection:
    """Compare the stage's graph "model" with `reference` part by part, on `inputs`.

    Values of the reference are held a slice at a time, of at most `slice_bytes` unless one part alone needs more, about
    three times: exact, in the graph's precision, and as the graph has them. The graph's weights are loaded for the
    parts of a slice only. Runs on ONNX Runtime on the CPU; a graph in bf16 in fp32, rounded to bf16 after every
    operation. Raises EngineError when a part cannot be run."""
    entry = bundle.entry(stage)
    path = bundle.graph(stage, MAIN_GRAPH)
    graph = CutGraph(path)
    shapes = reference.shapes(inputs)
    points = match(shapes, graph.dims, from_json(stage, entry.config), entry.exponents)
    points.sort(key=lambda point: graph.order[point.name])
    by_name = {point.name: point for point in points}
    cuts = set(by_name) - set(graph.ports)
    errors: list[PointError] = []
    slices = list(_slices(graph, points, cuts, slice_bytes))
    for number, part in enumerate(slices):
        progress(f"{stage}: part {number + 1} of {len(slices)}")
        errors += _compare(part, by_name, reference, inputs, path.parent, entry, graph)
    depth = _depth(graph, by_name, reference, inputs, path.parent, slice_bytes)
    errors = [_with_depth(error, depth) for error in errors]
    note = "the graph computes in bf16: run in fp32, rounded to bf16 after every operation" if graph.rounded else ""
    measured = tuple(error for error in errors if error.accumulated is not None)
    return Bisection(stage, entry.precision, tuple(errors), measured, len(slices), note)


def _slices(graph: CutGraph, points: Sequence[Point], cuts: set[str], most: int) -> Iterator[Part]:
    """The points in runs of at most `most` bytes of values, given and computed."""
    by_name = {point.name: point for point in points}
    run: list[str] = []
    held: set[str] = set()
    for point in points:
        names = {point.name, *graph.given_for(point.name, cuts)}
        if run and sum(by_name[name].nbytes for name in held | names) > most:
            yield graph.part(run, cuts)
            run, held = [], set()
        run.append(point.name)
        held |= names
    if run:
        yield graph.part(run, cuts)


def _compare(
    part: Part,
    points: Mapping[str, Point],
    reference: WatchedStage,
    inputs: Tensors,
    folder: Any,
    entry: StageEntry,
    graph: CutGraph,
) -> Iterator[PointError]:
    exact = reference.watch(inputs, {*part.outputs, *part.given}, compute="float64")
    given = {name: exact[name] for name in part.given}
    rough = reference.watch(inputs, part.outputs, given, COMPUTES[entry.precision])
    coarse = reference.watch(inputs, part.quantized, given, str(entry.quantization)) if part.quantized else {}
    session = open_proto(part.model, folder)
    fed = {name: inputs[name] for name in part.inputs}
    for name in part.given:
        half = graph.types[name] == TensorProto.FLOAT16
        with np.errstate(over="ignore"):
            fed[f"{name}{GIVEN}"] = points[name].to_graph(given[name]).astype(np.float16 if half else np.float32)
    found = dict(zip(part.outputs, session.run(list(part.outputs), fed), strict=True))
    largest = {name: float(np.abs(value).max(initial=0)) for name, value in exact.items()}
    for name in part.outputs:
        point = points[name]
        expected = point.rows(point.to_graph(exact[name]))
        own, worst, nonfinite = _errors(point.rows(found[name]), expected)
        _, floor, broken = _errors(point.rows(point.to_graph(rough[name])), expected)
        limit = FACTOR * max(0.0 if broken else floor, ROUNDOFF[entry.precision])
        limit = max(limit, SUMMED * expected.shape[1] ** 0.5 * ROUNDOFF[Precision.FP32])
        floor = np.inf if broken else floor
        if name in part.quantized:
            _, quantized, _ = _errors(point.rows(point.to_graph(coarse[name])), expected)
            limit = max(limit, QUANTIZED_FACTOR * quantized)
        ranges = {given_name: largest[given_name] for given_name in part.reads[name]}
        yield PointError(name, own, worst, floor, limit, largest[name], nonfinite, ranges, part.nodes[name])


def _errors(found: NDArray[np.float64], expected: NDArray[np.float64]) -> tuple[float, float, int]:
    """Relative L2 of rows of channels; the worst channel's, relative to it or to the usual one; values that are no
    numbers."""
    wrong = ~np.isfinite(found)
    error = np.linalg.norm(np.where(wrong, 0, found) - expected, axis=0)
    size = np.linalg.norm(expected, axis=0)
    total = float(np.linalg.norm(size))
    usual = total / np.sqrt(max(1, len(size)))
    if total == 0:
        return (0.0, 0.0, 0) if not error.any() else (np.inf, np.inf, int(wrong.sum()))
    return float(np.linalg.norm(error)) / total, float((error / np.maximum(size, usual)).max()), int(wrong.sum())


def _depth(
    graph: CutGraph, points: Mapping[str, Point], reference: WatchedStage, inputs: Tensors, folder: Any, most: int
) -> dict[str, float]:
    """Relative L2 after every block and at the outputs when the whole graph runs, by point; `most` bytes at a time."""
    names = [name for name in points if not block_of(name)[1] or name in graph.ports]
    found: dict[str, float] = {}
    while names:
        run = [name for place, name in enumerate(names) if place == 0 or _bytes(points, names[: place + 1]) <= most]
        names = names[len(run) :]
        exact = reference.watch(inputs, run, compute="float64")
        session = open_proto(graph.marked(run), folder)
        needed = {port.name for port in session.get_inputs()}
        values = session.run(run, {name: value for name, value in inputs.items() if name in needed})
        for name, value in zip(run, values, strict=True):
            point = points[name]
            found[name], _, nonfinite = _errors(point.rows(value), point.rows(point.to_graph(exact[name])))
            if nonfinite:
                found[name] = np.inf
    return found


def _bytes(points: Mapping[str, Point], names: Sequence[str]) -> int:
    return sum(points[name].nbytes for name in names)


def _with_depth(error: PointError, depth: Mapping[str, float]) -> PointError:
    return replace(error, accumulated=depth.get(error.name))
