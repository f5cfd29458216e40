"""Checks everything that needs a GPU on the tiny cascade: builds, verifies against the CPU, times, and reports.

Machines without a GPU cannot test this code. `check_gpu` is the test that people with a GPU can run.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from ..converters.checkpoints.open_model import open_model
from ..converters.checkpoints.tiny_cascade import write_tiny_cascade
from ..converters.export.export import export
from ..converters.export.export_options import ExportOptions
from ..converters.tensorrt import BuildOptions, build
from ..runtime.cascade import Cascade
from ..runtime.engines.engine_table import make_engine
from ..runtime.engines.onnxruntime import OnnxRuntimeEngine
from ..runtime.engines.protocol import F32, Engine
from ..runtime.engines.tensorrt.tensorrt_engine import TensorRTEngine
from ..runtime.examine_machine import Finding, Findings, examine
from ..runtime.sampling.loop import Step
from ..runtime.text.tokenizer import ClipTokenizer
from ..schemas.callbacks import ignored
from ..schemas.errors import ParityError
from ..schemas.precision import Precision, Target
from ..schemas.profiles import Bounds, parse_image_size
from ..schemas.quantization import Quantization
from ..schemas.stages import Stage
from ..schemas.targets import PLAIN, RTX, refusal
from ..storage.bundle import open_bundle
from .compare import compare
from .gpu_report import CheckRecorder, GpuReport, Keep, OnCheck
from .image_sizes import SizeChoice
from .recording import write_recording
from .reference_run import run_reference
from .sample_inputs import SampleSize
from .tolerances import FACTORS, Floors
from .verify import verify

BACKENDS = (RTX, PLAIN)
PRECISIONS = tuple(Precision)
PROVIDERS = ("onnxruntime", "onnxruntime-tensorrt")  # of ONNX Runtime, on the GPU
TF32_PROVIDER = "onnxruntime-tensorrt"  # the other computes fp32 in fp32
BACKEND_PARTS = ("build", "parity", "repeats", "memory", "timing")  # the checks of a backend in each precision
PROVIDER_PARTS = ("parity", "timing")

PROFILES = (Bounds(*map(parse_image_size, ("64x64x1", "256x256x1", "512x512x2"))),)
SIZES = ((256, 256), (136, 200), (448, 512), (72, 64))  # (width, height) in pixels, within PROFILES
PROMPT = "a tiny cascade"
TIMED = {"width": 512, "height": 512, "prior_steps": 20, "decoder_steps": 10, "seed": 0}
REPEATS = 4
# Error floors of each precision against fp32 on the CPU. The tolerances made of them are 1e-4, 5e-3 and 4.5e-2. On CPU
# engines the tiny cascade needs a fifth of that in fp16 and a quarter in bf16.
FLOORS: Floors = {Precision.FP32: 2.5e-5, Precision.FP16: 5e-3 / 3, Precision.BF16: 1.5e-2}
# ONNX Runtime's TensorRT provider multiplies fp32 in ten bits (TF32), so the floor of fp16 holds.
TF32_FLOORS: Floors = {**FLOORS, Precision.FP32: FLOORS[Precision.FP16]}
SPARE = 1.25  # times the largest stage: a memory budget that holds this stage but not all stages


class WrongOutputsError(ParityError):
    """The outputs of a check are wrong."""


@dataclass(frozen=True)
class TinyFiles:
    """The files of the checks: bundles and recordings of the tiny cascade below `folder`."""

    folder: Path

    def bundle(self, precision: Precision) -> Path:
        """The bundle that TensorRT engines are built from."""
        return self.folder / str(precision)

    @property
    def portable(self) -> Path:
        """The bundle for ONNX Runtime."""
        return self.folder / "reference"

    def recording(self, *, tf32: bool) -> Path:
        """The outputs of the CPU, with the floors of each precision."""
        return self.folder / f"{'tf32' if tf32 else 'plain'}.safetensors"


def check_gpu(keep: Keep = ignored, on_check: OnCheck = ignored) -> GpuReport:
    """Check every engine for the GPU that is installed here.

    The checks take a minute or two, and about 200 MB of the temporary folder. `keep` is called with the report after
    every check, because a driver may end the process. Exceptions inside checks are put in the report."""
    recorder = CheckRecorder(examine(), keep, on_check)
    findings = recorder.findings
    if findings.gpu is None or findings.gpu_problem:
        recorder.skip(_all_names(), findings.gpu_problem)
    else:
        with tempfile.TemporaryDirectory(prefix="cascadekit-gpu-") as folder:
            _check_all(recorder, TinyFiles(Path(folder)), findings.gpu.capability)
    return recorder.report(finished=True)


def _all_names() -> list[str]:
    """The names of all checks."""
    backends = [_part_names(backend, precision) for backend in BACKENDS for precision in PRECISIONS]
    return [name for names in (*backends, *map(_provider_names, PROVIDERS)) for name in names.values()]


def _part_names(backend: str, precision: Precision) -> dict[str, str]:
    return {part: f"{backend} {precision}: {part}" for part in BACKEND_PARTS}


def _provider_names(engine: str) -> dict[str, str]:
    return {part: f"{engine} on the GPU: {part}" for part in PROVIDER_PARTS}


def _check_all(recorder: CheckRecorder, files: TinyFiles, capability: str) -> None:
    if not recorder.do("the tiny cascade on the CPU", lambda: _prepare(files)):
        recorder.skip(_all_names(), "the tiny cascade could not be made")
        return
    for backend in BACKENDS:
        finding = _finding(recorder.findings, backend)
        for precision in PRECISIONS:
            refused = refusal(backend, capability, precision, Quantization.NONE)
            lacking = finding.lacking or (refused.reason if refused else "")
            if lacking:
                recorder.skip([*_part_names(backend, precision).values()], lacking)
            else:
                targets = (capability,) if backend == RTX else ()
                _check_backend(recorder, files, backend, precision, targets)
    for name in PROVIDERS:
        names = _provider_names(name)
        if lacking := _finding(recorder.findings, name).lacking:
            recorder.skip([*names.values()], lacking)
        else:
            recording = files.recording(tf32=name == TF32_PROVIDER)
            recorder.do(names["parity"], partial(_parity, files.portable, name, recording), compares=True)
            recorder.do(names["timing"], partial(_timing, files.portable, name))


def _finding(findings: Findings, engine: str) -> Finding:
    return next(found for found in findings.engines if (found.engine, found.device) == (engine, "cuda"))


def _prepare(files: TinyFiles) -> dict[str, Any]:
    """Export a TensorRT bundle in every precision and one for ONNX Runtime; record the outputs of the latter."""
    write_tiny_cascade(files.folder / "original")
    model = open_model([files.folder / "original"])
    for precision in PRECISIONS:
        options = ExportOptions(weights="copy", precision=precision, target=Target.TENSORRT)
        export(model, files.bundle(precision), options, fp16_safe="auto" if precision is Precision.FP16 else None)
    export(model, files.portable, weights="copy")
    bundle = open_bundle(files.portable)
    engine = OnnxRuntimeEngine(bundle)
    sizes = SizeChoice({stage: [SampleSize(size) for size in SIZES] for stage in bundle.manifest.stages})
    outputs = run_reference(engine, bundle, sizes=sizes)
    for tf32, floors in ((False, FLOORS), (True, TF32_FLOORS)):
        by_stage = dict.fromkeys(bundle.manifest.stages, floors)
        write_recording(replace(outputs, floors=by_stage), model.components, files.recording(tf32=tf32))
    return _timings(engine, files.portable)


def _check_backend(
    recorder: CheckRecorder, files: TinyFiles, backend: str, precision: Precision, targets: tuple[str, ...]
) -> None:
    names, root = _part_names(backend, precision), files.bundle(precision)
    if not recorder.do(names["build"], lambda: _build(root, backend, targets)):
        recorder.skip([names[part] for part in BACKEND_PARTS[1:]], "there are no engines to run")
        return

    def made(**wishes: Any) -> TensorRTEngine:
        engine = make_engine(backend, open_bundle(root), "cuda", **wishes)
        assert isinstance(engine, TensorRTEngine)
        return engine

    recorder.do(names["parity"], lambda: _parity(root, backend, files.recording(tf32=False)), compares=True)
    recorder.do(names["repeats"], lambda: _repeats(made()))
    recorder.do(names["memory"], lambda: _memory(made, root, FLOORS[precision] * FACTORS[precision]))
    recorder.do(names["timing"], lambda: _timing(root, backend))


def _build(root: Path, backend: str, targets: tuple[str, ...]) -> dict[str, Any]:
    built = build(root, BuildOptions(backend=backend, targets=targets, profiles=PROFILES))
    return {f"{one.stage}/{one.plan.graph}": {"seconds": one.plan.seconds, "bytes": one.plan.bytes} for one in built}


def _parity(root: Path, engine: str, recording: Path) -> dict[str, Any]:
    """Verify the bundle against the outputs of the CPU. Raises WrongOutputsError that names every failed comparison."""
    report = verify(root, recorded=recording, engine=engine, device="cuda", verdict=False)
    failures = [f"{one.name}: {'; '.join(one.failures)}" for one in report.comparisons if not one]
    if not report:
        raise WrongOutputsError(" | ".join(failures) or f"the image's PSNR is {report.image_psnr:.1f} dB")
    compared = {one.name: {"relative_l2": one.relative_l2, "limit": one.tolerance} for one in report.comparisons}
    return {"comparisons": compared, "left_out": list(report.left_out)}


def _repeats(engine: TensorRTEngine) -> dict[str, Any]:
    """Check that equal inputs give equal outputs, with or without a CUDA graph, and that other inputs do not."""
    latents = np.random.default_rng(0).standard_normal((1, 4, 64, 64), dtype=np.float32)
    with engine.load(Stage.VQGAN) as stage:
        outputs = [stage({"latents": latents})["images"] for _ in range(REPEATS)]
        facts = stage.facts()
        other = stage({"latents": latents[..., ::-1].copy()})["images"]
    worst = max(float(np.abs(output - outputs[0]).max()) for output in outputs)
    unchanged = np.array_equal(other, outputs[0])
    if worst > 0 or unchanged:
        kept = "the same output" if unchanged else "another output"
        raise WrongOutputsError(
            f"the vqgan gave outputs {worst:.1e} apart for one input, and {kept} for another; {facts}"
        )
    return facts


def _memory(made: Callable[..., TensorRTEngine], root: Path, tolerance: float) -> dict[str, Any]:
    """Check that a budget for the largest stage alone evicts the others, and that the image stays the same."""
    engine = made()
    free = engine.host.cuda.free_memory()
    with _cascade(engine, root) as cascade:
        plain = _image(cascade)
        sizes = [resident.device_bytes for resident in engine.room.residents]
    budget = int(max(sizes) * SPARE)
    tight = made(memory_budget=budget)
    with _cascade(tight, root) as cascade:
        squeezed = _image(cascade)
    found = compare("image", squeezed, plain, tolerance)
    numbers = {
        "largest_stage": max(sizes),
        "all_stages": sum(sizes),
        "budget": budget,
        "evictions": tight.room.evictions,
        "free_before": free,
        "free_after": engine.host.cuda.free_memory(),
    }
    if not found:
        raise WrongOutputsError(f"{'; '.join(found.failures)}; {numbers}")
    return {**numbers, "relative_l2": found.relative_l2}


def _image(cascade: Cascade) -> F32:
    width, height = SIZES[0]
    result = cascade.generate(PROMPT, width=width, height=height, prior_steps=4, decoder_steps=3, seed=0)
    assert result.pixels is not None
    return result.pixels


def _timing(root: Path, engine: str) -> dict[str, Any]:
    return _timings(make_engine(engine, open_bundle(root), "cuda"), root)


def _timings(engine: Engine, root: Path) -> dict[str, Any]:
    """Time two images of 512x512; the first one includes loading and compilation."""
    seconds: dict[str, float] = {}
    times: dict[str, list[float]] = {}

    def clock(stage: Stage, step: Step) -> None:
        times.setdefault(str(stage), []).append(perf_counter())

    with _cascade(engine, root) as cascade:
        for which in ("first_image_s", "image_s"):
            times.clear()
            started = perf_counter()
            cascade.generate(PROMPT, on_step=clock, **TIMED)  # type: ignore[arg-type]
            seconds[which] = round(perf_counter() - started, 4)
    steps = {stage: median(np.diff(at)) for stage, at in times.items()}
    return {**seconds, **{f"{stage}_step_ms": round(1e3 * float(step), 3) for stage, step in steps.items()}}


def _cascade(engine: Engine, root: Path) -> Cascade:
    bundle = open_bundle(root)
    return Cascade(engine, bundle.manifest, ClipTokenizer.open(bundle.tokenizer))
