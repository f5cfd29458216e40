"""Compares an engine with what the reference gives: stage by stage, step by step, and the image at the end."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...schemas.bundle import Manifest
from ...schemas.errors import UsageError
from ...schemas.precision import Precision
from ...schemas.stages import Stage
from ..engines.base import Engine
from ..tokenizer import ClipTokenizer
from .cases import Size
from .expected import Expected, Progress, Trajectory, draw, expect, noise_tape
from .metrics import Comparison, compare, psnr
from .presets import Preset, coarser, drift_tolerance, preset, psnr_needed
from .report import describe


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
            "comparisons": [describe(comparison).model_dump(mode="json") for comparison in self.comparisons],
        }


def verify(
    engine: Engine,
    reference: Engine | Expected,
    manifest: Manifest,
    tokenizer: ClipTokenizer,
    stages: Sequence[Stage] = (),
    progress: Progress = lambda what: None,
    size: Size | None = None,
) -> Report:
    """Compare `engine` with a reference, or with what one gave before, on the chosen stages (all there are when none
    are named), and along a trajectory when no stage was singled out and the bundle holds them all. `size` is
    as in `expect`.

    The reference runs first, then the engine, each with one stage in memory. Raises EngineError when a stage cannot be
    loaded or run, UsageError when what is expected does not hold a stage."""
    if not isinstance(reference, Expected):
        needed = precisions_of(engine, manifest, stages)
        reference = expect(reference, manifest, tokenizer, stages, needed, progress, size)
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
    for stage in chosen:
        progress(f"{stage} on {engine.name}")
        comparisons += _compare_stage(stage, engine, reference, presets[stage], trajectory=not stages)
    if stages or reference.trajectory is None:
        return Report(engine.name, reference.reference, tuple(comparisons), presets=presets)
    progress(f"trajectory on {engine.name}")
    tolerance = max(preset.tolerance for preset in presets.values())
    followed, image = _follow(engine, reference.trajectory, manifest, tokenizer, tolerance)
    images = image, reference.trajectory.image
    needed_psnr = psnr_needed(images[1], followed[-1].tolerance)
    comparisons += [*followed, *_noise(reference.trajectory)]
    return Report(engine.name, reference.reference, tuple(comparisons), psnr(*images), needed_psnr, images, presets)


def precisions_of(engine: Engine, manifest: Manifest, stages: Sequence[Stage] = ()) -> Collection[Precision]:
    """What floors are needed for: what the stages compute in on this engine, and bf16 in the place of fp16 where the
    reference overflows."""
    entries = [manifest.stages[stage] for stage in stages or tuple(manifest.stages)]
    found = {coarser(entry.precision, engine.precision) for entry in entries}
    return found | ({Precision.BF16} if Precision.FP16 in found else set())


def _compare_stage(
    stage: Stage, engine: Engine, expected: Expected, held_to: Preset, *, trajectory: bool
) -> Iterator[Comparison]:
    """The stage's cases, and its passes along the reference's trajectory: the engine sees the reference's latents."""
    tolerance = held_to.tolerance
    half = held_to.precision if held_to.precision is not Precision.FP32 else None
    runner = engine.load(stage)
    try:
        for case, outputs in zip(expected.cases, expected.outputs, strict=True):
            if case.stage is stage:
                found = runner(case.inputs)
                for name, tensor in outputs.items():
                    yield compare(f"{stage}: {name} ({case.label})", found[name], tensor, tolerance, half)
        calls = expected.trajectory.calls if trajectory and expected.trajectory else ()
        for call in (call for call in calls if call.stage is stage):
            found = runner(call.inputs)
            for name, tensor in call.outputs.items():
                label = f"teacher-forced: {stage} pass {call.number + 1}, {name}"
                yield compare(label, found[name], tensor, tolerance, half)
    finally:
        runner.close()


def _follow(
    engine: Engine, expected: Trajectory, manifest: Manifest, tokenizer: ClipTokenizer, tolerance: float
) -> tuple[list[Comparison], NDArray[np.float32]]:
    """The engine's own way from the same noise: latents after every step, at last the image, which comes along."""
    latents, image = draw(engine, manifest, tokenizer)
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
