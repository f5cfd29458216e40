"""The process of one phase: makes files, exports, or measures a stage or an image. It prints one line of JSON.

Only the phases that make files and export import the modules for it; the others start in a part of the time."""

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from ...runtime.engines.engine_table import make_engine
from ...runtime.engines.protocol import Engine, Run, Tensors
from ...runtime.memory.prediction import predict_peak
from ...runtime.memory.residency import RESIDENT, STAGED, MemoryPolicy
from ...runtime.sampling.denoiser import HoistedStage, is_hoisted, prepare
from ...schemas.errors import CascadeError
from ...schemas.hoisted import CONDITIONING, STEP
from ...schemas.layouts import Layout
from ...schemas.manifest import Manifest
from ...schemas.precision import Precision, Target
from ...schemas.settings import Settings
from ...schemas.stages import PRESETS, Stage, Variant
from ...storage.bundle import open_bundle
from ..process import bring_into_cache, bundle_files
from .job import RATIO, Arrays, GpuJob, inputs_of, relative_l2
from .memory import GpuMemory
from .phases import ENGINE, PACKAGES, SAMPLED, STAGES, Phase

Result = dict[str, Any]

FILES = {  # names by which the layout of the original files is known
    (Stage.PRIOR, Variant.LITE): "stage_c_lite_bf16",
    (Stage.PRIOR, Variant.FULL): "stage_c_bf16",
    (Stage.DECODER, Variant.LITE): "stage_b_lite_bf16",
    (Stage.DECODER, Variant.FULL): "stage_b_bf16",
}
BYTES_NEEDED = {Variant.LITE: 16e9, Variant.FULL: 40e9, Variant.TINY: 1e8}  # of disk, with one bundle
RATIOS = np.linspace(1, 0.05, 20, dtype=np.float32)  # a schedule; RATIO is put into it


def make(job: GpuJob, phase: Phase) -> Result:
    """A model folder with random weights of real size."""
    from ...converters.checkpoints.convert import convert
    from ...converters.checkpoints.tiny_cascade import write_tiny_cascade
    from ..standins import require_space, write_stand_in

    root = job.root(phase)
    shutil.rmtree(root, ignore_errors=True)
    original = root / "original"
    original.mkdir(parents=True)
    require_space(root, BYTES_NEEDED[phase.variant])
    began = perf_counter()
    if phase.variant is Variant.TINY:
        write_tiny_cascade(original)
    else:
        for stage in SAMPLED:
            file = original / f"{FILES[stage, phase.variant]}.safetensors"
            write_stand_in(file, PRESETS[stage, phase.variant], "BF16")
        write_stand_in(original / "stage_a.safetensors", PRESETS[Stage.VQGAN, Variant.FULL], "BF16")
        write_stand_in(original / "unused", PRESETS[Stage.TEXT_ENCODER, Variant.FULL], "BF16")
    written = perf_counter()
    convert([original], job.model(phase), Layout.DIFFUSERS)
    converted = perf_counter()
    shutil.rmtree(original)
    nbytes = sum(path.stat().st_size for path in job.model(phase).rglob("*.safetensors"))
    return {"write_s": written - began, "convert_s": converted - written, "bytes": nbytes}


def export_bundle(job: GpuJob, phase: Phase) -> Result:
    """A bundle for ONNX Runtime, all stages in one precision."""
    from ...converters.export.export import export

    assert phase.precision is not None
    target = Target.PORTABLE if (job.device, phase.precision) == ("cpu", Precision.BF16) else Target.ORT
    began = perf_counter()
    export(
        job.model(phase),
        job.bundle(phase),
        stages=STAGES,
        precision=phase.precision,
        storage=phase.precision if phase.precision is Precision.FP32 else None,
        target=target,
        hash=False,
        force=True,
    )
    return {"seconds": perf_counter() - began, "target": str(target)}


def build_packages(job: GpuJob, phase: Phase) -> Result:
    """Packages of every stage for the size that is measured."""
    from ...converters.tensorrt import build
    from ...schemas.profiles import Bounds, parse_image_size

    began = perf_counter()
    size = parse_image_size(f"{job.side}x{job.side}")
    built = build(
        job.bundle(phase), backend=PACKAGES, stages=STAGES, profiles=(Bounds(size, size, size),), device=job.device
    )
    return {"seconds": perf_counter() - began, "packages": len(built)}


def remove_bundle(job: GpuJob, phase: Phase) -> Result:
    """Make room: the bundles of the full cascade in fp16 and fp32 take 36 GB."""
    shutil.rmtree(job.bundle(phase), ignore_errors=True)
    return {}


def engine_stage(job: GpuJob, phase: Phase) -> Result:
    """One stage on one engine: loading, the first pass, the median of further passes, and the distance to fp32."""
    assert phase.stage is not None
    said: list[str] = []
    bundle = open_bundle(job.bundle(phase))
    for path in bundle_files(bundle.root):
        bring_into_cache(path)
    inputs = inputs_of(bundle, phase.stage, job.side)
    how: dict[str, Any] = {"cuda_graph": phase.cuda_graph, "tf32": phase.tf32, "say": said.append}
    with GpuMemory() as memory:
        engine = make_engine(phase.engine, bundle, job.device, **how)
        began = perf_counter()
        run, changing = _loaded(engine, phase.stage, inputs)
        loaded = perf_counter()
        outputs = run({name: inputs[name] for name in changing})
        first = perf_counter() - loaded
        run({name: inputs[name] for name in changing})  # the first replay of a CUDA graph is compared with a run
    seconds = []
    for number in range(job.runs):
        given = _varied({name: inputs[name] for name in changing}, number)
        started = perf_counter()
        run(given)
        seconds.append(perf_counter() - started)
    again = run({name: inputs[name] for name in changing})
    return {
        "load_s": loaded - began,
        "first_s": first,
        "ms": 1e3 * median(seconds),
        **_parity(job, phase, again),
        "first_equals_later": relative_l2(outputs, again),
        "memory_mb": memory.megabytes,
        "predicted_mb": _predicted(bundle.manifest, job, STAGED, phase.stage),
        "said": said,
    }


def _predicted(manifest: Manifest, job: GpuJob, policy: MemoryPolicy, stage: Stage | None = None) -> int:
    """The GPU memory in MiB that `generate` predicts for an image: of all stages, or with `stage` alone."""
    stages = {stage: manifest.stages[stage]} if stage else manifest.stages
    settings = Settings(job.side, job.side)
    chosen = manifest.model_copy(update={"stages": stages})
    return predict_peak(chosen, policy, settings, 1, device="cuda").nbytes >> 20


def _loaded(engine: Engine, stage: Stage, inputs: Arrays) -> tuple[Run, tuple[str, ...]]:
    """The stage as sampling runs it, with its conditions bound, and the names of the inputs that change."""
    if stage not in SAMPLED:
        return engine.load(stage), tuple(inputs)
    changing = ("sample", "timestep_ratio")
    constants = {name: array for name, array in inputs.items() if name not in changing}
    if not is_hoisted(engine, stage):
        return engine.load(stage).bind(constants), changing
    ratios = np.append(RATIOS, np.float32(RATIO))
    with engine.load(stage, CONDITIONING) as conditioning:
        prepared = prepare(conditioning, stage, inputs["sample"], constants, ratios)
    return HoistedStage(engine.load(stage, STEP), prepared, ratios), changing


def _varied(inputs: Arrays, number: int) -> Tensors:
    """Other inputs for every pass: another step of the schedule, and other latents."""
    varied = {name: array for name, array in inputs.items() if array.dtype != np.float32}
    for name, array in inputs.items():
        if name == "timestep_ratio":
            varied[name] = np.full_like(array, RATIOS[number % len(RATIOS)])
        elif name not in varied:
            varied[name] = np.roll(array, number + 1, axis=-1)
    return varied


def _parity(job: GpuJob, phase: Phase, outputs: Arrays) -> Result:
    """The distance to diffusers in fp32; where it is not there, to our own graph in fp32 without TF32.

    That graph's outputs are kept, and have no distance themselves."""
    if not all(np.isfinite(array).all() for array in outputs.values()):
        return {"finite": False, "relative_l2": None, "against": None}
    reference, own = job.reference(phase), job.reference(phase, own=True)
    exact = phase.precision is Precision.FP32 and phase.engine == ENGINE and phase.cuda_graph and not phase.tf32
    if exact:
        np.savez(own, **outputs)  # type: ignore[arg-type]
    found = reference if reference.exists() else own if own.exists() and not exact else None
    if found is None:
        return {"finite": True, "relative_l2": None, "against": None}
    with np.load(found) as expected:
        distance = relative_l2(outputs, dict(expected))
    return {"finite": True, "relative_l2": distance, "against": "diffusers" if found == reference else "own fp32"}


def image(job: GpuJob, phase: Phase) -> Result:
    """A cold start: a fresh process that generates an image, and then two more."""
    from ..first_image import FirstImageJob

    start = FirstImageJob(
        threads=0,
        runs=2,
        bundle=str(job.bundle(phase)),
        device=job.device,
        engine=phase.engine,
        memory="resident",
        size=(job.side, job.side),
        steps=(job.prior_steps, job.decoder_steps),
        checked=False,
    )
    for path in bundle_files(Path(start.bundle)):
        bring_into_cache(path)
    with GpuMemory() as memory:
        found = start.work(phase.name)
    predicted = _predicted(open_bundle(job.bundle(phase)).manifest, job, RESIDENT)
    return {**found, "memory_mb": memory.megabytes, "predicted_mb": predicted}


def needs(work: Callable[[GpuJob, Phase], Result], *packages: str) -> Callable[[GpuJob, Phase], Result]:
    """`work` if `packages` are installed; else a result that says what is missing."""

    def checked(job: GpuJob, phase: Phase) -> Result:
        missing = [name for name in packages if find_spec(name) is None]
        return {"missing": ", ".join(missing)} if missing else work(job, phase)

    return checked


def _diffusers(job: GpuJob, phase: Phase) -> Result:
    from .diffusers_work import measure_diffusers

    return measure_diffusers(job, phase)


def _compiled(job: GpuJob, phase: Phase) -> Result:
    from .diffusers_work import measure_compiled

    return measure_compiled(job, phase)


WORK: Mapping[str, Callable[[GpuJob, Phase], Result]] = {
    "make": make,
    "export": export_bundle,
    "build": needs(build_packages, "torch"),
    "engine": engine_stage,
    "image": image,
    "remove": remove_bundle,
    "diffusers": needs(_diffusers, "torch", "diffusers", "transformers"),
    "compile": needs(_compiled, "torch", "diffusers"),
}


def main() -> None:
    given = json.loads(sys.argv[1])
    job, phase = GpuJob(**given["job"]), _phase(given["phase"])
    try:
        print(json.dumps(WORK[phase.work](job, phase)))
    except CascadeError as error:
        sys.exit(str(error))  # the reason, without a traceback


def _phase(values: dict[str, Any]) -> Phase:
    kinds = {"variant": Variant, "stage": Stage, "precision": Precision}
    parsed = {name: kind(values[name]) for name, kind in kinds.items() if values[name] is not None}
    return Phase(**{**values, **parsed})
