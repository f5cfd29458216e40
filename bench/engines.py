"""Measures engines on one stage, and the rate of the machine's matrix product."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..converters.checkpoints.component import Component
from ..converters.export.export import export
from ..parity.compare import compare
from ..schemas.callbacks import Say, ignored
from ..schemas.errors import UsageError
from ..schemas.operations import multiply_adds
from ..schemas.ports import ports_of
from ..schemas.sizes import latent_sizes
from ..schemas.stages import NetworkConfig, Stage, TextEncoderConfig, UNetConfig
from .bench_report import spread
from .engine_worker import GEMM, LOADERS, EngineJob, save_arrays
from .process import bench_folder
from .standins import describe, source_file

REFERENCE = "torch"  # in fp32
DEFAULT_ENGINES = ("onnxruntime", "openvino", "openvino-bf16", "torch", "torch-bf16")
TRACED = "onnxruntime-traced"
UNETS_ONLY = ("diffusers", "diffusers-bf16", "onnxruntime-hoisted", "openvino-bf16-hoisted")


@dataclass(frozen=True)
class EngineFigures:
    """The measurements of one engine: every forward of every round, and its processes."""

    version: str
    seconds: list[float]
    cpu_seconds: list[float]  # of all threads
    load_seconds: list[float]
    first_seconds: list[float]  # of the forward that compiles, packs and grows its memory
    rss_after_load: dict[str, int]
    rss_after_runs: dict[str, int]
    peak_rss: int
    relative_l2: float | None  # against the fp32 reference; None without one


@dataclass(frozen=True)
class EnginesReport:
    """The measurements of all engines."""

    machine: dict[str, Any]
    source: dict[str, Any]
    sizes: dict[str, int]
    threads: int
    multiply_adds: int
    gemm: dict[str, list[float]]  # multiply-adds per second, one a round, by library and dtype
    engines: dict[str, EngineFigures]
    missing: dict[str, str]  # engines that were not measured, and the reasons

    def fraction(self, engine: str) -> float:
        """The share of the machine's best product in the engine's dtype that its median forward reached."""
        dtype = "bf16" if "bf16" in engine else "fp32"
        rates = [rate for name, rates in self.gemm.items() if name.endswith(dtype) for rate in rates]
        if not rates:
            return float("nan")
        return self.multiply_adds / median(self.engines[engine].seconds) / max(rates)

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for json.dumps."""
        content = asdict(self)
        for name, measured in self.engines.items():
            content["engines"][name] |= {**spread(measured.seconds), "fraction_of_gemm": self.fraction(name)}
        return content


def bench_engines(
    work: Path,
    *,
    network: str = "prior-lite",
    dtype: str = "BF16",
    source: Path | None = None,
    engines: Sequence[str] = DEFAULT_ENGINES,
    size: tuple[int, int] = (1024, 1024),
    batch: int = 2,
    threads: int = 2,
    rounds: int = 3,
    runs: int = 2,
    say: Say = ignored,
) -> EnginesReport:
    """Measure `engines` on one forward of `source`, or of a stand-in for `network` stored in `dtype`.

    The forward is that of an image of `size` (height, width), in a folder below `work` that is removed at the end. In
    each of `rounds` rounds every engine has a process of its own. It loads the stage, runs it once, and then runs it
    `runs` times for the measurement.

    Raises UsageError for engines and sources that cannot be measured, ConversionError when a process fails."""
    with bench_folder(work) as (folder, machine):
        component, file = source_file(folder, network, dtype, given=source, outputs=0.1, say=say)
        missing = _missing(engines, component.config)
        sizes = port_sizes(component.config, size, batch)
        job = replace(_prepare(component, file, folder, sizes), threads=threads, runs=runs)
        present = [engine for engine in engines if engine not in missing]
        if TRACED in present:
            say("tracing; neither its time nor its memory is counted")
            _run(job, TRACED, runs=0)
        results, gemm = _measure_rounds(job, present, rounds, say)
        reference = _reference_outputs(job, present, say)
        return EnginesReport(
            machine=machine,
            source=describe(component, file, generated=source is None),
            sizes=sizes,
            threads=threads,
            multiply_adds=multiply_adds(component.config, sizes),
            gemm=gemm,
            engines={name: _measured(found, _outputs(job, name), reference) for name, found in results.items()},
            missing=missing,
        )


def _missing(engines: Sequence[str], config: NetworkConfig) -> dict[str, str]:
    """The engines that cannot be measured, and the reasons. Raises UsageError for unknown engines, and when none is
    left to measure."""
    unknown = [engine for engine in engines if engine not in LOADERS]
    if unknown:
        raise UsageError(f"engine {', '.join(unknown)}: expected some of {', '.join(LOADERS)}")
    missing = {}
    for engine in engines:
        absent = [name for name in LOADERS[engine][1] if find_spec(name) is None]
        if absent:
            missing[engine] = f"not installed: {', '.join(absent)}"
        elif engine in UNETS_ONLY and not isinstance(config, UNetConfig):
            missing[engine] = f"has no {config.stage}"
    if len(missing) == len(engines):
        raise UsageError(f"no engine to measure: {'; '.join(f'{name}: {why}' for name, why in missing.items())}")
    return missing


def port_sizes(config: NetworkConfig, size: tuple[int, int], batch: int) -> dict[str, int]:
    """The symbolic dims of a stage's ports when it works on images of `size` (height, width)."""
    if isinstance(config, TextEncoderConfig):
        return {"batch": batch}
    latents = latent_sizes(*size)
    (prior_height, prior_width), (height, width) = latents.prior, latents.decoder
    if config.stage is Stage.PRIOR:
        return {"batch": batch, "height": prior_height, "width": prior_width, "tokens": 77, "images": 1}
    effnet = {"effnet_height": prior_height, "effnet_width": prior_width} if config.stage is Stage.DECODER else {}
    return {"batch": batch, "height": height, "width": width, **effnet}


def _prepare(component: Component, file: Path, folder: Path, sizes: Mapping[str, int]) -> EngineJob:
    """Export the stage, with linked weights if possible, and write the inputs of every engine."""
    bundle = folder / "bundle"
    export(file, bundle, weights="link" if file.stat().st_dev == folder.stat().st_dev else "copy")
    save_arrays(folder / "inputs.npz", _inputs(component.config, sizes))
    return EngineJob(
        engine="",
        stage=str(component.stage),
        source=str(file),
        bundle=str(bundle),
        inputs=str(folder / "inputs.npz"),
        outputs="",
        folder=str(folder),
        threads=1,
        runs=0,
    )


def _inputs(config: NetworkConfig, sizes: Mapping[str, int]) -> dict[str, NDArray[Any]]:
    """Normal noise, timesteps within 0..1, and for the text encoder random ids without padding."""
    random = np.random.default_rng(0)
    inputs: dict[str, NDArray[Any]] = {}
    for port in ports_of(config).inputs:
        shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in port.dims)
        if port.name == "input_ids" and isinstance(config, TextEncoderConfig):
            inputs[port.name] = random.integers(0, config.vocab_size, shape)
        elif port.dtype == "int64":
            inputs[port.name] = np.ones(shape, np.int64)
        elif port.name == "timestep_ratio":
            inputs[port.name] = np.linspace(0.95, 0.05, sizes["batch"], dtype=np.float32)
        else:
            inputs[port.name] = random.standard_normal(shape, np.float32)
    return inputs


def _measure_rounds(
    job: EngineJob, engines: Sequence[str], rounds: int, say: Say
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[float]]]:
    """The results of the workers by engine, one a round, and the rates of the matrix product."""
    results: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    gemm: dict[str, list[float]] = {}
    for number in range(1, rounds + 1):
        for name, rate in _run(job, GEMM)["rates"].items():
            gemm.setdefault(name, []).append(rate)
        for engine in engines:
            result = _run(job, engine)
            results[engine].append(result)
            say(f"round {number} of {rounds}: {engine} {median(result['seconds']):.3f} s")
    return results, gemm


def _run(job: EngineJob, engine: str, **changes: Any) -> dict[str, Any]:
    return replace(job, engine=engine, outputs=str(_outputs(job, engine)), **changes).work(engine)


def _outputs(job: EngineJob, engine: str) -> Path:
    return Path(job.folder) / f"{engine}.npz"


def _reference_outputs(job: EngineJob, measured: Sequence[str], say: Say) -> Path | None:
    """The outputs of the fp32 reference, which is run here unless it was measured; None without torch."""
    if REFERENCE in measured:
        return _outputs(job, REFERENCE)
    if find_spec("torch") is None:
        return None
    say("the fp32 reference, to compare with")
    _run(job, REFERENCE, runs=0)
    return _outputs(job, REFERENCE)


def _measured(results: Sequence[Mapping[str, Any]], outputs: Path, reference: Path | None) -> EngineFigures:
    return EngineFigures(
        version=results[0]["version"],
        seconds=[seconds for result in results for seconds in result["seconds"]],
        cpu_seconds=[seconds for result in results for seconds in result["cpu_seconds"]],
        load_seconds=[result["load_seconds"] for result in results],
        first_seconds=[result["first_seconds"] for result in results],
        rss_after_load=max((result["rss_after_load"] for result in results), key=lambda rss: rss["anonymous"]),
        rss_after_runs=max((result["rss_after_runs"] for result in results), key=lambda rss: rss["anonymous"]),
        peak_rss=max(result["peak_rss"] for result in results),
        relative_l2=_distance(outputs, reference) if reference else None,
    )


def _distance(outputs: Path, reference: Path) -> float:
    """The greatest relative L2 among the outputs."""
    with np.load(outputs) as found, np.load(reference) as expected:
        return max(compare(name, found[name], expected[name], 0.0).relative_l2 for name in expected.files)
