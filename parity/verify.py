"""Compares an engine with what the reference gives: stage by stage, step by step, and the image at the end."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.engines.base import Engine, StageRunner, Tensors
from ..runtime.text.tokenizer import ClipTokenizer
from ..schemas.bundle import Manifest
from ..schemas.errors import OutsideProfileError, UsageError
from ..schemas.precision import Precision
from ..schemas.quantization import Quantization
from ..schemas.stages import Stage
from .compare import Comparison, compare, psnr
from .image_sizes import Sizes
from .reference_run import Expected, Progress, Trajectory, draw, expect, noise_tape
from .report.build import describe
from .sample_inputs import SITUATIONS
from .stage_parts import ways
from .tolerances import Preset, coarser, drift_tolerance, preset, psnr_needed


@dataclass(frozen=True)
class Report:
    """Everything compared; true when all of it passed."""

    engine: str
    reference: str
    comparisons: tuple[Comparison, ...]
    image_psnr: float | None = None  # dB; None without a trajectory
    image_psnr_needed: float = 0.0
    images: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None  # found and expected, (1, 3, h, w) in 0..1
    presets: Mapping[Stage, Preset] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()  # in words, what an engine built for some sizes does not take

    def __bool__(self) -> bool:
        return all(self.comparisons) and bool(self.comparisons) and not self.image_failed

    @property
    def image_failed(self) -> bool:
        return self.image_psnr is not None and not self.image_psnr >= self.image_psnr_needed

    def to_json(self) -> dict[str, Any]:
        """Plain values; a PSNR of equal images is null beside "images_equal"."""
        equal = self.image_psnr == float("inf")
        return {
            "passed": bool(self),
            "engine": self.engine,
            "reference": self.reference,
            "image_psnr_db": None if equal else self.image_psnr,
            "image_psnr_needed_db": None if self.image_psnr is None else self.image_psnr_needed,
            "images_equal": equal,
            "presets": {stage: {**asdict(p), "tolerance": p.tolerance} for stage, p in self.presets.items()},
            "left_out": list(self.left_out),
            "comparisons": [describe(comparison).model_dump(mode="json") for comparison in self.comparisons],
        }


def verify(
    engine: Engine,
    reference: Engine | Expected,
    manifest: Manifest,
    tokenizer: ClipTokenizer,
    stages: Sequence[Stage] = (),
    progress: Progress = lambda what: None,
    sizes: Sizes | None = None,
) -> Report:
    """Compare `engine` with a reference, or with what one gave before, on the chosen stages (all there are when none
    are named), and along a trajectory when no stage was singled out and the bundle holds them all. `sizes` are those of
    `choose_sizes`. What an engine was not built for is left out, and the report says so; a stage of which nothing is
    left is an error.

    The reference runs first, then the engine, each with one stage in memory. Raises EngineError when a stage cannot be
    loaded or run, UsageError when what is expected does not hold a stage."""
    if not isinstance(reference, Expected):
        needed = kinds_of(engine, manifest, stages)
        reference = expect(reference, manifest, tokenizer, stages, needed, progress, sizes)
    chosen = tuple(stages or manifest.stages)
    missing = [stage for stage in chosen if stage not in reference.stages]
    if missing:
        have = ", ".join(reference.stages)
        raise UsageError(f"nothing is recorded of the {missing[0]}, only of {have}; record it, or choose with --stage")
    presets = {
        stage: preset(manifest.stages[stage], engine.name, engine.precision, reference.floors.get(stage, {}))
        for stage in chosen
    }
    comparisons: list[Comparison] = []
    left_out: list[str] = []
    for stage in chosen:
        progress(f"{stage} on {engine.name}")
        passes = _passes(stage, reference, trajectory=not stages)
        comparisons += _compare_stage(stage, engine, passes, presets[stage], left_out)
    report = Report(engine.name, reference.reference, tuple(comparisons), presets=presets, left_out=tuple(left_out))
    if stages or reference.trajectory is None:
        return report
    progress(f"trajectory on {engine.name}")
    return _with_image(report, engine, reference.trajectory, manifest, tokenizer)


def _with_image(
    report: Report, engine: Engine, expected: Trajectory, manifest: Manifest, tokenizer: ClipTokenizer
) -> Report:
    """What is compared along the engine's own way, too, unless it was not built for that."""
    tolerance = max(preset.tolerance for preset in report.presets.values())
    noise = tuple(_noise(expected))
    try:
        followed, image = _follow(engine, expected, manifest, tokenizer, tolerance)
    except OutsideProfileError as error:
        left_out = (*report.left_out, f"the image: {error}")
        return replace(report, comparisons=(*report.comparisons, *noise), left_out=left_out)
    return replace(
        report,
        comparisons=(*report.comparisons, *followed, *noise),
        image_psnr=psnr(image, expected.image),
        image_psnr_needed=psnr_needed(expected.image, followed[-1].tolerance),
        images=(image, expected.image),
    )


def kinds_of(engine: Engine, manifest: Manifest, stages: Sequence[Stage] = ()) -> Collection[Precision | Quantization]:
    """What floors are needed for: what the stages compute in on this engine, bf16 in the place of fp16 where the
    reference overflows, and how they are quantised."""
    entries = [manifest.stages[stage] for stage in stages or tuple(manifest.stages)]
    precisions = {coarser(entry.precision, engine.precision) for entry in entries}
    instead = {Precision.BF16} if Precision.FP16 in precisions else set()
    return precisions | instead | ({entry.quantization for entry in entries} - {Quantization.NONE})


@dataclass(frozen=True)
class _Pass:
    """A forward pass of the reference. A comparison's name has what stands `before` and `after` that of the output."""

    before: str
    after: str
    inputs: Tensors
    outputs: Mapping[str, NDArray[Any]]


def _passes(stage: Stage, expected: Expected, *, trajectory: bool) -> list[_Pass]:
    """The stage's cases, the small ones first, and its passes along the reference's trajectory: the engine sees the
    reference's latents."""
    cases = zip(expected.cases, expected.outputs, strict=True)
    calls = expected.trajectory.calls if trajectory and expected.trajectory else ()
    return [
        *(_Pass(f"{stage}: ", f" ({c.label})", c.inputs, outputs) for c, outputs in cases if c.stage is stage),
        *(
            _Pass(f"teacher-forced: {stage} pass {call.number + 1}, ", "", call.inputs, call.outputs)
            for call in calls
            if call.stage is stage
        ),
    ]


def _compare_stage(
    stage: Stage, engine: Engine, passes: Sequence[_Pass], held_to: Preset, left_out: list[str]
) -> Iterator[Comparison]:
    """The stage each way the engine runs it: the first in all passes, another in the small ones, which find what is
    wrong with a graph."""
    for number, (way, load) in enumerate(ways(engine, stage)):
        with load() as runner:
            chosen = passes if number == 0 else passes[: len(SITUATIONS[stage])]
            yield from _compare_passes(runner, way, chosen, held_to, left_out)


def _compare_passes(
    runner: StageRunner, way: str, passes: Sequence[_Pass], held_to: Preset, left_out: list[str]
) -> Iterator[Comparison]:
    """Raises OutsideProfileError when the runner takes none of them."""
    half = held_to.precision if held_to.precision is not Precision.FP32 else None
    outside: list[str] = []
    for each in passes:
        try:
            found = runner(each.inputs)
        except OutsideProfileError:
            outside.append(f"{each.before.rstrip(', :')}{way}{each.after}")
            if len(outside) == len(passes):
                raise
            continue
        for name, tensor in each.outputs.items():
            label = f"{each.before}{name}{way}{each.after}"
            yield compare(label, found[name], tensor, held_to.tolerance, half)
    left_out += outside


def _follow(
    engine: Engine, expected: Trajectory, manifest: Manifest, tokenizer: ClipTokenizer, tolerance: float
) -> tuple[list[Comparison], NDArray[np.float32]]:
    """The engine's own way from the same noise: latents after every step, at last the image, which comes along."""
    height, width = expected.image.shape[2:]
    latents, image = draw(engine, manifest, tokenizer, (width, height))
    comparisons = [
        compare(f"trajectory: {name}", latents[name], tensor, drift_tolerance(expected.gains[name], tolerance))
        for name, tensor in expected.latents.items()
    ]
    allowed = drift_tolerance(expected.gains["image"], tolerance)
    return [*comparisons, compare("trajectory: image", image, expected.image, allowed)], image


def _noise(expected: Trajectory) -> Iterator[Comparison]:
    """What this machine draws against what was drawn for a recording."""
    tape = noise_tape(expected) if expected.noise else {}
    for name, drawn in expected.noise.items():
        yield compare(f"noise: {name}", tape[name], drawn, 0.0)
