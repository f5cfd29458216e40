"""Measures builds of GPU engines from networks of real size, and estimates builds of larger ones."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..converters.export.export import export
from ..converters.onnx import GraphOptions, write_graph
from ..converters.tensorrt import BuildOptions, Built, build
from ..converters.tensorrt.estimate import Estimate, estimate
from ..converters.tensorrt.plans_to_build import graphs_of
from ..converters.tensorrt.worker_process import OnProgress
from ..schemas.callbacks import Say, ignored
from ..schemas.dtypes import parse_dtype
from ..schemas.precision import Precision, Target
from ..schemas.profiles import DEFAULT, Bounds
from ..schemas.stages import PRESETS
from ..schemas.tensors import expected_tensors
from ..storage.safetensors_reader import TensorRange
from .process import bench_folder
from .standins import NETWORKS, source_file

LITE_CASCADE = ("text-encoder", "prior-lite", "decoder-lite", "vqgan")


@dataclass(frozen=True)
class BuildsReport:
    """The plans that were built, each with the name of its network, and estimates for networks that were not built."""

    machine: dict[str, Any]
    backend: str
    built: tuple[tuple[str, Built], ...]
    expected: dict[tuple[str, str], Estimate]

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for json.dumps. Ratios are to the bytes of the weights as the graph computes them."""
        return {
            "machine": self.machine,
            "backend": self.backend,
            "builds": [{"network": network, **_figures(built)} for network, built in self.built],
            "estimates": [
                {"network": network, "graph": graph, **vars(each)} for (network, graph), each in self.expected.items()
            ],
        }


def _figures(built: Built) -> dict[str, Any]:
    plan, outcome, expected = built.plan, built.outcome, built.estimate
    assert outcome is not None  # as every plan was built
    assert expected is not None
    return {
        "graph": plan.graph,
        "targets": plan.targets,
        "precision": str(plan.precision),
        "nodes": expected.nodes,
        "weight_bytes": expected.weights,
        "seconds": outcome.seconds,
        "cpu_seconds": outcome.cpu_seconds,
        "peak_rss": outcome.peak_rss,
        "peak_own": outcome.peak_own,
        "plan_bytes": outcome.bytes,
        "ratios": {
            "peak_rss / weights": outcome.peak_rss / expected.weights,
            "peak_own / weights": outcome.peak_own / expected.weights,
            "plan / weights": outcome.bytes / expected.weights,
            "cpu_seconds / estimate": outcome.cpu_seconds / expected.seconds,
            "peak_own / estimate": outcome.peak_own / expected.memory,
            "plan / estimate": outcome.bytes / expected.plan,
        },
    }


def bench_builds(
    work: Path,
    *,
    networks: Sequence[str] = LITE_CASCADE,
    targets: Sequence[str] = ("sm89",),
    precision: Precision = Precision.BF16,
    bounds: Bounds = DEFAULT,
    expected: Sequence[str] = ("prior", "decoder"),
    say: Say = ignored,
    on_progress: OnProgress = ignored,
) -> BuildsReport:
    """Build the graphs that `generate` runs of stand-ins for `networks` with TensorRT-RTX, one network at a time.

    The files are in a folder below `work` that is removed at the end. Builds of the networks `expected` are only
    estimated, without files. Raises UsageError for a wrong or too small work folder, and what `build` raises."""
    options = BuildOptions(targets=tuple(targets), profiles=(bounds,))
    measured: list[tuple[str, Built]] = []
    with bench_folder(work) as (folder, machine):
        for network in networks:
            here = folder / network
            here.mkdir()
            dtype = "F32" if precision is Precision.FP32 else "BF16"
            outputs = 2 if precision is Precision.FP16 else 1
            _, source = source_file(here, network, dtype, outputs=outputs, say=say)
            export(source, here / "bundle", precision=precision, target=Target.TENSORRT)
            for built in build(here / "bundle", options, on_progress=on_progress, say=say):
                say(f"{network}/{built.plan.graph}: {built.plan.seconds:.1f} s")
                measured.append((network, built))
            shutil.rmtree(here)
    backend = {f"{built.plan.backend} {built.plan.backend_version}" for _, built in measured}
    estimates = {key: each for network in expected for key, each in _expected(network, precision).items()}
    return BuildsReport(machine, ", ".join(backend), tuple(measured), estimates)


def _expected(network: str, precision: Precision) -> dict[tuple[str, str], Estimate]:
    """The estimated cost of the builds of a network, from its graphs."""
    config = PRESETS[NETWORKS[network]]
    options = GraphOptions(precision=precision, target=Target.TENSORRT)
    weights: dict[str, TensorRange] = {}
    end = 0
    for name, shape in expected_tensors(config).items():
        nbytes = math.prod(shape) * (4 if precision is Precision.FP32 else 2)
        weights[name] = TensorRange(Path("weights"), str(parse_dtype(precision)), shape, end, nbytes)
        end += nbytes
    names = graphs_of(config.stage)
    return {
        (network, name): estimate(write_graph(config, weights, options, name), name, precision, 1) for name in names
    }
