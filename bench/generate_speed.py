"""Measures whole generations, by this package and by diffusers' pipelines on the same weights."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from ..converters.checkpoints.convert import convert
from ..converters.checkpoints.tiny_cascade import write_tiny_cascade
from ..converters.export.export import export
from ..runtime.memory.prediction import predict_peak
from ..runtime.memory.residency import MemoryPolicy
from ..schemas.callbacks import Say, ignored
from ..schemas.errors import UsageError
from ..schemas.layouts import Layout
from ..schemas.stages import EVERY_IMAGE, PRESETS, Stage, Variant
from ..schemas.tensors import expected_tensors
from .generate_worker import PROGRAMS, GenerateJob
from .process import bench_folder
from .standins import NETWORKS, require_space, write_stand_in

DEFAULT_PROGRAMS = ("onnxruntime", "openvino-bf16", "diffusers", "diffusers-bf16")
STAND_INS = {"prior-lite": "stage_c_lite_bf16", "decoder-lite": "stage_b_lite_bf16", "vqgan": "stage_a"}
TEXT = "text-encoder"


@dataclass(frozen=True)
class Generation:
    """The measurements of one program; every list has one entry a round."""

    version: str
    stage_seconds: dict[str, list[float]]  # of each stage's network; of one step of prior and decoder
    load_seconds: list[float]
    image_seconds: list[float]
    loop_seconds: list[float]  # of an image without networks: tokens, noise, sampler, loop
    peak_rss: int


@dataclass(frozen=True)
class GenerateReport:
    """The measurements of all programs."""

    machine: dict[str, Any]
    job: dict[str, Any]
    predicted_peak: int  # bytes of memory that `generate` predicts for such an image
    programs: dict[str, Generation]
    missing: dict[str, str]  # programs that are not installed, and the packages they need

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for json.dumps, with medians and the ratios of each round to the first program."""
        content = asdict(self)
        first = next(iter(self.programs.values()))
        for name, found in self.programs.items():
            content["programs"][name] |= {
                "loop_share": median(found.loop_seconds) / median(found.image_seconds),
                "ratios": [a / b for a, b in zip(found.image_seconds, first.image_seconds, strict=True)],
            }
        return content


def bench_generate(
    work: Path,
    *,
    model: Path | None = None,
    programs: Sequence[str] = DEFAULT_PROGRAMS,
    tiny: bool = False,
    size: tuple[int, int] = (512, 512),
    steps: tuple[int, int] = (4, 2),
    memory: str = "resident",
    threads: int = 2,
    rounds: int = 3,
    runs: int = 1,
    say: Say = ignored,
) -> GenerateReport:
    """Generate images of `size` (height, width) with `steps` of prior and decoder, in a folder below `work`.

    `model` is a model folder; without it a stand-in of the lite cascade's size is written, or the `tiny` cascade. The
    folder is removed at the end. In each of `rounds` rounds every program has a process of its own. It generates once,
    and then `runs` times for the measurement.

    Raises UsageError for programs that cannot be measured, ConversionError when a process fails."""
    missing = _missing(programs)
    with bench_folder(work) as (folder, machine):
        source = model.absolute() if model else _stand_in(folder, say, tiny=tiny)
        manifest = export(source, folder / "bundle", stages=EVERY_IMAGE)
        job = GenerateJob(
            program="",
            model=str(source),
            bundle=str(folder / "bundle"),
            memory=memory,
            threads=threads,
            height=size[0],
            width=size[1],
            prior_steps=steps[0],
            decoder_steps=steps[1],
            runs=runs,
        )
        results = _rounds(job, [name for name in programs if name not in missing], rounds, say)
        return GenerateReport(
            machine=machine,
            job={k: v for k, v in asdict(job).items() if k not in ("program", "model", "bundle")},
            predicted_peak=predict_peak(manifest, MemoryPolicy.parse(memory), job.settings, 1).nbytes,
            programs={name: _generation(job, found) for name, found in results.items()},
            missing=missing,
        )


def _missing(programs: Sequence[str]) -> dict[str, str]:
    unknown = [name for name in programs if name not in PROGRAMS]
    if unknown:
        raise UsageError(f"program {', '.join(unknown)}: expected some of {', '.join(PROGRAMS)}")
    missing = {name: f"not installed: {PROGRAMS[name][0]}" for name in programs if find_spec(PROGRAMS[name][0]) is None}
    if len(missing) == len(programs):
        raise UsageError(f"nothing to measure: {'; '.join(missing.values())}")
    return missing


def _stand_in(folder: Path, say: Say, *, tiny: bool) -> Path:
    """A model folder with random weights."""
    original = folder / "original"
    original.mkdir()
    if tiny:
        write_tiny_cascade(original)
    else:
        counts = [sum(_sizes(PRESETS[NETWORKS[name]])) for name in (*STAND_INS, TEXT)]
        require_space(folder, 4 * sum(counts))
        say(f"writing a stand-in for the lite cascade: {2 * sum(counts) / 1e9:.1f} GB of BF16, and its model folder")
        for name, file in STAND_INS.items():
            write_stand_in(original / f"{file}.safetensors", PRESETS[NETWORKS[name]], "BF16")
        write_stand_in(original / "unused", PRESETS[Stage.TEXT_ENCODER, Variant.FULL], "BF16")
    convert([original], folder / "model", Layout.DIFFUSERS)
    return folder / "model"


def _sizes(config: Any) -> list[int]:
    return [math.prod(shape) for shape in expected_tensors(config).values()]


def _rounds(job: GenerateJob, programs: Sequence[str], rounds: int, say: Say) -> dict[str, list[dict[str, Any]]]:
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in programs}
    for number in range(1, rounds + 1):
        for name in programs:
            result = replace(job, program=name).work(name)
            results[name].append(result)
            say(f"round {number} of {rounds}: {name} {result['spent']['all'] / job.runs:.2f} s an image")
    return results


def _generation(job: GenerateJob, results: Sequence[dict[str, Any]]) -> Generation:
    calls = {Stage.PRIOR: job.prior_steps, Stage.DECODER: job.decoder_steps}
    spent = [{name: seconds / job.runs for name, seconds in result["spent"].items()} for result in results]
    return Generation(
        version=results[0]["version"],
        stage_seconds={stage: [each.get(stage, 0.0) / calls.get(stage, 1) for each in spent] for stage in EVERY_IMAGE},
        load_seconds=[result["first"].get("load", 0.0) for result in results],
        image_seconds=[each["all"] for each in spent],
        loop_seconds=[2 * each["all"] - sum(each.values()) for each in spent],  # "all" is among the values
        peak_rss=max(result["peak_rss"] for result in results),
    )
