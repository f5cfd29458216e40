"""Checks everything that needs a GPU on the tiny cascade: builds, runs, compares with the CPU, times, and reports.

Machines without a GPU cannot test this code. `check_gpu` is the test that people with a GPU can run.
"""

import platform
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from ..converters.checkpoints.open_model import open_model
from ..converters.checkpoints.tiny_cascade import write_tiny_cascade
from ..converters.export.export import export
from ..converters.export.export_options import Fp16Safe
from ..converters.tensorrt import BuildOptions, build
from ..runtime.cascade import Cascade, PromptEmbeds
from ..runtime.engines.engine_table import make_engine
from ..runtime.engines.onnxruntime import OnnxRuntimeEngine
from ..runtime.engines.protocol import F32, Engine
from ..runtime.engines.tensorrt.tensorrt_engine import TensorRTEngine
from ..runtime.examine_machine import Finding, Findings, examine
from ..runtime.sampling.loop import Step
from ..runtime.text.tokenizer import ClipTokenizer
from ..schemas.errors import CascadeError
from ..schemas.precision import Precision, Target
from ..schemas.profiles import Bounds, parse_image_size
from ..schemas.quantization import Quantization
from ..schemas.stages import Stage
from ..schemas.targets import PLAIN, RTX, refusal
from ..storage.bundle import Bundle, open_bundle
from .compare import Comparison, compare

PASSED, FAILED, NOT_CHECKED = "passed", "failed", "not checked"
BACKENDS = (RTX, PLAIN)
PRECISIONS = tuple(Precision)
PROVIDERS = ("onnxruntime", "onnxruntime-tensorrt")  # of ONNX Runtime, on the GPU
PARTS = ("build", "parity", "repeats", "memory", "timing")  # the checks of a backend in each precision

PROFILES = (Bounds(*map(parse_image_size, ("64x64x1", "256x256x1", "512x512x2"))),)
PROMPTS = ("a tiny cascade", "two, three, four", "a hat")
NEGATIVE = "blurry"
TIMED = {"width": 512, "height": 512, "prior_steps": 20, "decoder_steps": 10, "seed": 0}
REPEATS = 4
# Relative L2 against the fp32 CPU engine, of one pass and after many. On CPU engines the tiny cascade reaches a fifth
# of the former in fp16 and a quarter in bf16.
STAGE_TOLERANCE = {Precision.FP32: 1e-4, Precision.FP16: 5e-3, Precision.BF16: 4.5e-2}
TRAJECTORY_TOLERANCE = {Precision.FP32: 1e-3, Precision.FP16: 1e-2, Precision.BF16: 9e-2}
SPARE = 1.25  # times the largest stage: a memory budget that holds this stage but not all stages


@dataclass(frozen=True)
class ImageSpec:
    """The size in pixels and the number of the images of one check."""

    height: int
    width: int
    images: int


IMAGES = (
    ImageSpec(256, 256, 1),
    ImageSpec(200, 136, 2),
    ImageSpec(512, 448, 1),
    ImageSpec(64, 72, 1),
)  # within PROFILES


@dataclass(frozen=True)
class GpuCheck:
    """The result of one check; `numbers` are its measurements, `trace` is the traceback of a failure."""

    name: str
    result: str
    seconds: float
    detail: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    trace: str = ""

    @property
    def done(self) -> bool:
        return self.result != NOT_CHECKED


@dataclass(frozen=True)
class GpuReport:
    """All checks; true when the checks ended, some outputs were compared and no check failed."""

    created: str
    created_by: str
    findings: Findings
    checks: tuple[GpuCheck, ...]
    finished: bool

    def __bool__(self) -> bool:
        compared = [check for check in self.checks if check.done and check.name.endswith("parity")]
        return self.finished and bool(compared) and all(check.result != FAILED for check in self.checks)

    @property
    def not_checked(self) -> dict[str, list[str]]:
        """Names of the checks that were not made, by the reason."""
        found: dict[str, list[str]] = {}
        for check in self.checks:
            if not check.done:
                found.setdefault(check.detail, []).append(check.name)
        return found

    @property
    def verdict(self) -> str:
        counts = {result: sum(c.result == result for c in self.checks) for result in (PASSED, FAILED, NOT_CHECKED)}
        return ", ".join(f"{count} {result}" for result, count in counts.items())

    def to_json(self) -> dict[str, Any]:
        return {"format": "cascadekit-gpu-report", "version": 1, "passed": bool(self), **asdict(self)}


Keep = Callable[[GpuReport], object]
OnCheck = Callable[[GpuCheck], object]


@dataclass(frozen=True)
class CpuOutputs:
    """The outputs of every stage on the CPU in fp32, for one set of images."""

    case: ImageSpec
    embeds: PromptEmbeds
    prior: F32
    decoder: F32
    pixels: F32


class _WrongError(Exception):
    """The outputs of a check are wrong."""


class _Recorder:
    """Makes checks and keeps the result of each, whatever exception it raises."""

    def __init__(self, findings: Findings, keep: Keep, on_check: OnCheck) -> None:
        self.findings = findings
        self.checks: list[GpuCheck] = []
        self._keep = keep
        self._on_check = on_check

    def report(self, *, finished: bool) -> GpuReport:
        created = datetime.now(UTC).isoformat(timespec="seconds")
        made_by = f"cascadekit {version('cascadekit')}, Python {platform.python_version()}"
        return GpuReport(created, made_by, self.findings, tuple(self.checks), finished)

    def do(self, name: str, work: Callable[[], dict[str, Any]]) -> bool:
        """Run the check `work`, which returns its measurements; returns whether it passed."""
        started = perf_counter()
        try:
            numbers = work()
        except (_WrongError, CascadeError) as error:
            return self._add(GpuCheck(name, FAILED, perf_counter() - started, str(error), trace=traceback.format_exc()))
        except Exception as error:  # whatever a GPU library raises belongs in the report
            detail = f"{type(error).__name__}: {error}"
            return self._add(GpuCheck(name, FAILED, perf_counter() - started, detail, trace=traceback.format_exc()))
        return self._add(GpuCheck(name, PASSED, perf_counter() - started, numbers=numbers))

    def skip(self, names: Sequence[str], reason: str) -> None:
        for name in names:
            self._add(GpuCheck(name, NOT_CHECKED, 0.0, reason))

    def _add(self, check: GpuCheck) -> bool:
        self.checks.append(check)
        self._keep(self.report(finished=False))
        self._on_check(check)
        return check.result == PASSED


def check_gpu(keep: Keep = lambda report: None, on_check: OnCheck = lambda check: None) -> GpuReport:
    """Check every engine for the GPU that is installed here.

    It takes a minute or two, and about 200 MB of the temporary folder. `keep` is called with the report after every
    check, because a driver may end the process. Exceptions inside checks are put in the report."""
    recorder = _Recorder(examine(), keep, on_check)
    findings = recorder.findings
    if findings.gpu is None or findings.gpu_problem:
        recorder.skip(_all_names(), findings.gpu_problem)
    else:
        with tempfile.TemporaryDirectory(prefix="cascadekit-gpu-") as folder:
            _check_all(recorder, Path(folder), findings.gpu.capability)
    report = recorder.report(finished=True)
    keep(report)
    return report


def _all_names() -> list[str]:
    """The names of all checks."""
    backends = [name for backend in BACKENDS for precision in PRECISIONS for name in _names(backend, precision)]
    return [*backends, *(f"{engine} on the GPU: {part}" for engine in PROVIDERS for part in ("parity", "timing"))]


def _names(backend: str, precision: Precision) -> list[str]:
    return [f"{backend} {precision}: {part}" for part in PARTS]


def _check_all(recorder: _Recorder, folder: Path, capability: str) -> None:
    bundles = {precision: folder / str(precision) for precision in PRECISIONS}
    reference = folder / "reference"
    expected: list[CpuOutputs] = []
    prepared = recorder.do("the tiny cascade on the CPU", lambda: _prepare(folder, bundles, reference, expected))
    if not prepared:
        recorder.skip(_all_names(), "the tiny cascade could not be made")
        return
    for backend in BACKENDS:
        finding = _finding(recorder.findings, backend)
        for precision in PRECISIONS:
            refused = refusal(backend, capability, precision, Quantization.NONE)
            lacking = finding.lacking or (refused.reason if refused else "")
            if lacking:
                recorder.skip(_names(backend, precision), lacking)
            else:
                _check_backend(recorder, bundles[precision], backend, precision, capability, expected)
    for name in PROVIDERS:
        lacking = _finding(recorder.findings, name).lacking
        names = [f"{name} on the GPU: {part}" for part in ("parity", "timing")]
        if lacking:
            recorder.skip(names, lacking)
        else:
            _check_provider(recorder, reference, name, names, expected)


def _finding(findings: Findings, engine: str) -> Finding:
    return next(found for found in findings.engines if (found.engine, found.device) == (engine, "cuda"))


def _prepare(
    folder: Path, bundles: dict[Precision, Path], reference: Path, expected: list[CpuOutputs]
) -> dict[str, Any]:
    """Export a TensorRT bundle in every precision and one for ONNX Runtime; run the latter on the CPU."""
    write_tiny_cascade(folder / "original")
    model = open_model([folder / "original"])
    for precision, root in bundles.items():
        safe: Fp16Safe = "auto" if precision is Precision.FP16 else None
        export(model, root, weights="copy", precision=precision, target=Target.TENSORRT, fp16_safe=safe)
    export(model, reference, weights="copy")
    bundle = open_bundle(reference)
    with _cascade(OnnxRuntimeEngine(bundle), bundle) as cascade:
        expected += [_expected(cascade, case) for case in IMAGES]
        return _timings(cascade)


def _expected(cascade: Cascade, case: ImageSpec) -> CpuOutputs:
    embeds = cascade.encode_prompt(PROMPTS[: case.images], NEGATIVE)
    prior = _prior(cascade, case, embeds)
    decoder = _decoder(cascade, case, prior, embeds)
    return CpuOutputs(case, embeds, prior, decoder, cascade.pixels(decoder))


def _prior(cascade: Cascade, case: ImageSpec, embeds: PromptEmbeds) -> F32:
    return _last(cascade.prior(embeds, height=case.height, width=case.width, steps=4, guidance=4.0, seed=0))


def _decoder(cascade: Cascade, case: ImageSpec, prior: F32, embeds: PromptEmbeds) -> F32:
    steps = cascade.decode(prior, embeds, height=case.height, width=case.width, steps=3, guidance=1.5, seed=1)
    return _last(steps)


def _last(steps: Any) -> F32:
    latents: F32 | None = None
    for step in steps:
        latents = step.latents
    assert latents is not None
    return latents


def _check_backend(
    recorder: _Recorder, root: Path, backend: str, precision: Precision, capability: str, expected: list[CpuOutputs]
) -> None:
    names = dict(zip(PARTS, _names(backend, precision), strict=True))
    if not recorder.do(names["build"], lambda: _build(root, backend, capability)):
        recorder.skip([names[part] for part in PARTS[1:]], "there are no engines to run")
        return
    bundle = open_bundle(root)

    def made(**wishes: Any) -> TensorRTEngine:
        engine = make_engine(backend, bundle, "cuda", **wishes)
        assert isinstance(engine, TensorRTEngine)
        return engine

    recorder.do(names["parity"], lambda: _parity(made(), bundle, precision, expected))
    recorder.do(names["repeats"], lambda: _repeats(made(), expected[0]))
    recorder.do(names["memory"], lambda: _memory(made, bundle, precision, expected[0]))
    recorder.do(names["timing"], lambda: _timed(made(), bundle))


def _check_provider(recorder: _Recorder, root: Path, name: str, names: list[str], expected: list[CpuOutputs]) -> None:
    bundle = open_bundle(root)
    recorder.do(
        names[0], lambda: _parity(make_engine(name, bundle, "cuda"), bundle, Precision.FP32, expected, tf32=True)
    )
    recorder.do(names[1], lambda: _timed(make_engine(name, bundle, "cuda"), bundle))


def _build(root: Path, backend: str, capability: str) -> dict[str, Any]:
    targets = (capability,) if backend == RTX else ()
    built = build(root, BuildOptions(backend=backend, targets=targets, profiles=PROFILES))
    return {f"{one.stage}/{one.plan.graph}": {"seconds": one.plan.seconds, "bytes": one.plan.bytes} for one in built}


def _parity(
    engine: Engine, bundle: Bundle, precision: Precision, expected: list[CpuOutputs], *, tf32: bool = False
) -> dict[str, Any]:
    """Compare every stage at every size on the CPU's inputs, so that the errors of stages do not add up.

    With `tf32`, products in fp32 have ten bits, which is the default of ONNX Runtime on a GPU; the limits of fp16 then
    hold."""
    limits = Precision.FP16 if tf32 and precision is Precision.FP32 else precision
    compared: list[Comparison] = []
    with _cascade(engine, bundle) as cascade:
        for wanted in expected:
            compared += _compare_case(cascade, wanted, limits)
    failures = [f"{one.name}: {'; '.join(one.failures)}" for one in compared if not one]
    if failures:
        raise _WrongError(" | ".join(failures))
    return {one.name: {"relative_l2": one.relative_l2, "limit": one.tolerance} for one in compared}


def _compare_case(cascade: Cascade, wanted: CpuOutputs, limits: Precision) -> list[Comparison]:
    case = wanted.case
    label = f"{case.height}x{case.width}x{case.images}"
    once, many = STAGE_TOLERANCE[limits], TRAJECTORY_TOLERANCE[limits]
    embeds = cascade.encode_prompt(PROMPTS[: case.images], NEGATIVE)
    pairs = (
        ("text", embeds.clip_text, wanted.embeds.clip_text, once),
        ("pooled text", embeds.pooled, wanted.embeds.pooled, once),
        ("negative text", embeds.negative_clip_text, wanted.embeds.negative_clip_text, once),
        ("prior", _prior(cascade, case, wanted.embeds), wanted.prior, many),
        ("decoder", _decoder(cascade, case, wanted.prior, wanted.embeds), wanted.decoder, many),
        ("vqgan", cascade.pixels(wanted.decoder), wanted.pixels, once),
    )
    return [compare(f"{label} {name}", found, reference, limit) for name, found, reference, limit in pairs]


def _repeats(engine: TensorRTEngine, wanted: CpuOutputs) -> dict[str, Any]:
    """Check that equal inputs give equal outputs, with or without a CUDA graph, and that other inputs do not."""
    latents = wanted.decoder[:1]
    with engine.load(Stage.VQGAN) as stage:
        outputs = [stage({"latents": latents})["images"] for _ in range(REPEATS)]
        facts = stage.facts()
        other = stage({"latents": latents[..., ::-1].copy()})["images"]
    worst = max(float(np.abs(output - outputs[0]).max()) for output in outputs)
    if worst > 0 or np.array_equal(other, outputs[0]):
        raise _WrongError(
            f"the vqgan gave outputs {worst:.1e} apart for one input, and "
            f"{'the same' if np.array_equal(other, outputs[0]) else 'others'} for another; {facts}"
        )
    return facts


def _memory(
    made: Callable[..., TensorRTEngine], bundle: Bundle, precision: Precision, wanted: CpuOutputs
) -> dict[str, Any]:
    """Check that a budget for the largest stage alone evicts the others, and that the image stays the same."""
    engine = made()
    free = engine.host.cuda.free_memory()
    with _cascade(engine, bundle) as cascade:
        plain = _image(cascade, wanted)
        sizes = [resident.device_bytes for resident in engine.room.residents]
    budget = int(max(sizes) * SPARE)
    tight = made(memory_budget=budget)
    with _cascade(tight, bundle) as cascade:
        squeezed = _image(cascade, wanted)
    found = compare("image", squeezed, plain, STAGE_TOLERANCE[precision])
    numbers = {
        "largest_stage": max(sizes),
        "all_stages": sum(sizes),
        "budget": budget,
        "evictions": tight.room.evictions,
        "free_before": free,
        "free_after": engine.host.cuda.free_memory(),
    }
    if not found:
        raise _WrongError(f"{'; '.join(found.failures)}; {numbers}")
    return {**numbers, "relative_l2": found.relative_l2}


def _image(cascade: Cascade, wanted: CpuOutputs) -> F32:
    embeds = cascade.encode_prompt(PROMPTS[: wanted.case.images], NEGATIVE)
    prior = _prior(cascade, wanted.case, embeds)
    return cascade.pixels(_decoder(cascade, wanted.case, prior, embeds))


def _timed(engine: Engine, bundle: Bundle) -> dict[str, Any]:
    with _cascade(engine, bundle) as cascade:
        return _timings(cascade)


def _timings(cascade: Cascade) -> dict[str, Any]:
    """Time two images of 512x512; the first one includes loading and compilation."""
    seconds: dict[str, float] = {}
    times: dict[str, list[float]] = {}

    def clock(stage: Stage, step: Step) -> None:
        times.setdefault(str(stage), []).append(perf_counter())

    for which in ("first_image_s", "image_s"):
        times.clear()
        started = perf_counter()
        cascade.generate(PROMPTS[0], on_step=clock, **TIMED)  # type: ignore[arg-type]
        seconds[which] = round(perf_counter() - started, 4)
    steps = {stage: median(np.diff(at)) for stage, at in times.items()}
    return {**seconds, **{f"{stage}_step_ms": round(1e3 * float(step), 3) for stage, step in steps.items()}}


def _cascade(engine: Engine, bundle: Bundle) -> Cascade:
    return Cascade(engine, bundle.manifest, ClipTokenizer.open(bundle.tokenizer))
