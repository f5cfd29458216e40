"""Measures the factors of verify's tolerances: the error of an engine divided by the reference's own error.

The networks are tiny cascades of random weights. The ratio hardly depends on the network. So a tolerance is a factor
times a floor that is measured on the same model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from ..converters.checkpoints.convert import convert
from ..converters.checkpoints.open_model import open_model
from ..converters.checkpoints.tiny_cascade import write_tiny_cascade
from ..converters.export.export import export
from ..parity.compare import Kind
from ..parity.compare_engine import compare_engine
from ..parity.inside.bisect import bisect_stage
from ..parity.inside.bisection import Bisection
from ..parity.reference.loading import reference_engine
from ..parity.reference_run import run_reference
from ..parity.results import Report
from ..runtime.engines.engine_table import make_engine
from ..schemas.callbacks import Say, ignored
from ..schemas.layouts import Layout
from ..schemas.precision import Precision
from ..schemas.quantization import BUNDLE_SCHEMES, Quantization
from ..schemas.stages import EVERY_IMAGE, Stage
from ..storage.bundle import open_bundle

# The bundle's precision, and the engines that run it. On CPUs no engine runs graphs in bf16.
RUNS = (
    (Precision.FP32, ("onnxruntime", "openvino", "openvino-bf16")),
    (Precision.FP16, ("onnxruntime",)),
)
FP16_SAFE = 3
PARTS = "parts of a graph"


@dataclass(frozen=True)
class Ratio:
    """The pass of a stage with the largest ratio, over all networks."""

    engine: str
    kind: Precision | Quantization
    stage: Stage
    floor: float  # the reference's own error
    relative_l2: float  # the engine's error

    @property
    def ratio(self) -> float:
        return self.relative_l2 / self.floor


def measure_ratios(networks: int, say: Say = ignored) -> list[Ratio]:
    """The largest ratio over `networks` cascades, for each engine, precision or quantisation, and stage.

    The engine "parts of a graph" is bisection: the worst channel of the part that is nearest to its limit."""
    found: list[Ratio] = []
    for seed in range(networks):
        with TemporaryDirectory(prefix="cascadekit-parity-") as folder:
            say(f"network {seed + 1} of {networks}")
            found += _of_network(Path(folder), seed)
    worst: dict[tuple[str, Precision | Quantization, Stage], Ratio] = {}
    for ratio in found:
        key = (ratio.engine, ratio.kind, ratio.stage)
        if key not in worst or ratio.ratio > worst[key].ratio:
            worst[key] = ratio
    return list(worst.values())


def _of_network(folder: Path, seed: int) -> list[Ratio]:
    write_tiny_cascade(folder / "original", seed)
    convert([folder / "original"], folder / "model", Layout.DIFFUSERS)
    model = open_model([folder / "model"])
    reference = reference_engine(model, EVERY_IMAGE)
    found: list[Ratio] = []
    for precision in Precision:
        safe = FP16_SAFE if precision is Precision.FP16 else None
        export(model, folder / precision, precision=precision, fp16_safe=safe)
    expected = run_reference(reference, open_bundle(folder / Precision.FP32))
    for precision in Precision:
        bundle = open_bundle(folder / precision)
        for engine in dict(RUNS).get(precision, ()):
            found += _of_report(compare_engine(make_engine(engine, bundle), expected, bundle))
        found += [_of_parts(bisect_stage(bundle, stage, reference)) for stage in bundle.manifest.stages]
    for kind in BUNDLE_SCHEMES:
        export(model, folder / kind, weights="copy", quantize=kind)
        bundle = open_bundle(folder / kind)
        found += _of_report(compare_engine(make_engine("onnxruntime", bundle), expected, bundle))
    return found


def _of_report(report: Report) -> list[Ratio]:
    """The ratios of one report. The floor of a quantised stage is that of its quantisation, else of its precision."""
    found = []
    for stage, tolerance in report.tolerances.items():
        quantized = tolerance.quantization is not Quantization.NONE
        kind = tolerance.quantization if quantized else tolerance.precision
        floor = tolerance.quantized_floor if quantized else tolerance.floor
        found.append(Ratio(report.engine, kind, stage, floor, _worst(report, stage)))
    return found


def _worst(report: Report, stage: Stage) -> float:
    """The largest error of the stage's passes on the inputs of the reference."""
    same_inputs = (Kind.STAGE, Kind.TEACHER_FORCED)
    found = (each for each in report.comparisons if each.stage is stage and each.kind in same_inputs)
    return max(comparison.relative_l2 for comparison in found)


def _of_parts(found: Bisection) -> Ratio:
    nearest = max(found.parts, key=lambda part: part.worst_channel / part.limit)
    return Ratio(PARTS, found.precision, found.stage, nearest.held_to, nearest.worst_channel)


def table_rows(ratios: Sequence[Ratio]) -> list[tuple[str, ...]]:
    return [
        (r.engine, str(r.kind), str(r.stage), f"{r.floor:.1e}", f"{r.relative_l2:.1e}", f"{r.ratio:.2f}")
        for r in ratios
    ]
