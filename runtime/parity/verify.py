"""Runs an engine and the reference on the same inputs, stage by stage and along a whole trajectory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...schemas.bundle import Manifest, StageEntry
from ...schemas.control import is_control
from ...schemas.precision import Precision
from ...schemas.quantization import Quantization
from ...schemas.stages import Stage
from ..engines.base import Engine
from ..pipeline import Cascade, Settings
from ..residency import STAGED
from ..sampling import Step
from ..tokenizer import ClipTokenizer
from .metrics import Comparison, compare, psnr

# Relative L2 of one forward pass against the fp32 reference. Half precision: five times what PyTorch's own modules
# of small random networks are off in that type, 1e-3 and 9e-3.
STAGE_TOLERANCE = {Precision.FP32: 1e-4, Precision.FP16: 5e-3, Precision.BF16: 4.5e-2}
# The same of latents after many steps, each feeding the next.
TRAJECTORY_TOLERANCE = {Precision.FP32: 1e-3, Precision.FP16: 1e-2, Precision.BF16: 9e-2}
IMAGE_PSNR = {Precision.FP32: 50.0, Precision.FP16: 45.0, Precision.BF16: 27.0}  # dB; 8-bit rounding alone is 58.9
COARSENESS = (Precision.FP32, Precision.FP16, Precision.BF16)
# Quantised Linears, where that is more: about three times what small random networks lose.
QUANTIZED_TOLERANCE = {
    Quantization.NONE: 0.0,
    Quantization.INT8: 5e-2,
    Quantization.INT8_DYNAMIC: 0.15,
    Quantization.FP8: 0.1,
    Quantization.INT4: 0.5,
}
QUANTIZED_PSNR = 15.0

PROMPTS = ("", "a shiba inu wearing a beret, oil on canvas", "one, two, three " * 40)
NEGATIVE = "blurry"

PHOTOS = ({"batch": 1, "height": 128, "width": 128}, {"batch": 2, "height": 101, "width": 67})
MAPS = ({"batch": 1, "height": 6, "width": 6}, {"batch": 2, "height": 5, "width": 7})

# Sizes of the symbolic dims, per stage: one small and even, one odd in every way the ports allow.
CASES: Mapping[Stage, tuple[dict[str, int], ...]] = {
    Stage.TEXT_ENCODER: ({"batch": len(PROMPTS)},),
    Stage.PRIOR: (
        {"batch": 1, "height": 6, "width": 6, "tokens": 77, "images": 1},
        {"batch": 2, "height": 5, "width": 7, "tokens": 77, "images": 2},
    ),
    Stage.DECODER: (
        {"batch": 1, "height": 32, "width": 32, "effnet_height": 6, "effnet_width": 6},
        {"batch": 2, "height": 18, "width": 26, "effnet_height": 5, "effnet_width": 7},
    ),
    Stage.VQGAN: ({"batch": 1, "height": 32, "width": 32}, {"batch": 2, "height": 9, "width": 13}),
    Stage.IMAGE_ENCODER: ({"batch": 2},),
    Stage.EFFNET_ENCODER: PHOTOS,
    Stage.PREVIEWER: MAPS,
    Stage.CONTROLNET_CANNY: PHOTOS,
    Stage.CONTROLNET_INPAINTING: PHOTOS,
    Stage.CONTROLNET_SUPER_RESOLUTION: MAPS,
    Stage.CONTROLNET_IDENTITY: MAPS,
}
TRAJECTORY_STAGES = (Stage.TEXT_ENCODER, Stage.PRIOR, Stage.DECODER, Stage.VQGAN)

TRAJECTORY = Settings(256, 256, prior_steps=4, prior_guidance=4.0, decoder_steps=3, decoder_guidance=1.5)

Progress = Callable[[str], object]  # told what is compared next


@dataclass(frozen=True)
class Report:
    """Everything compared; true when all of it passed."""

    engine: str
    reference: str
    comparisons: tuple[Comparison, ...]
    image_psnr: float | None = None  # dB; None without a trajectory
    image_psnr_needed: float = IMAGE_PSNR[Precision.FP32]

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
            "images_equal": equal,
            "comparisons": [{**asdict(c), "passed": bool(c), "failures": c.failures} for c in self.comparisons],
        }


def verify(
    engine: Engine,
    reference: Engine,
    manifest: Manifest,
    tokenizer: ClipTokenizer,
    stages: Sequence[Stage] = (),
    progress: Progress = lambda what: None,
) -> Report:
    """Compare `engine` with `reference` on the chosen stages (all there are when none are named), and along a
    trajectory with guidance in both stages when no stage was singled out and the bundle holds them all.

    Every stage runs alone in memory. Raises EngineError when a stage cannot be loaded or run."""
    chosen = stages or tuple(manifest.stages)
    comparisons = [
        comparison
        for stage in chosen
        for comparison in _compare_stage(stage, manifest.stages[stage], engine, reference, tokenizer, progress)
    ]
    image_psnr = None
    if not stages and set(TRAJECTORY_STAGES) <= set(manifest.stages):
        followed, image_psnr = _compare_trajectories(engine, reference, manifest, tokenizer, progress)
        comparisons += followed
    return Report(engine.name, reference.name, tuple(comparisons), image_psnr, _limits(engine, manifest)[1])


def _coarser(precision: Precision, other: Precision | None) -> Precision:
    return max(precision, other or precision, key=COARSENESS.index)


def _limits(engine: Engine, manifest: Manifest) -> tuple[float, float]:
    """What a trajectory through all stages is held to: relative L2 of its latents, PSNR of its image in dB."""
    entries = manifest.stages.values()
    coarsest = max((_coarser(entry.precision, engine.precision) for entry in entries), key=COARSENESS.index)
    quantized = max(QUANTIZED_TOLERANCE[entry.quantization] for entry in entries)
    psnr_needed = min(IMAGE_PSNR[coarsest], QUANTIZED_PSNR) if quantized else IMAGE_PSNR[coarsest]
    return max(TRAJECTORY_TOLERANCE[coarsest], 2 * quantized), psnr_needed


def stage_inputs(entry: StageEntry, sizes: Mapping[str, int], rng: np.random.Generator) -> dict[str, NDArray[Any]]:
    """Seeded inputs for one forward pass: normal noise, and timesteps spread over 0..1."""
    shapes = {
        port.name: tuple(sizes[dim] if isinstance(dim, str) else dim for dim in port.dims)
        for port in entry.inputs
        if not is_control(port.name)
    }
    inputs = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    if "timestep_ratio" in inputs:
        inputs["timestep_ratio"] = np.linspace(0.95, 0.05, sizes["batch"], dtype=np.float32)
    return inputs


def _compare_stage(
    stage: Stage,
    entry: StageEntry,
    engine: Engine,
    reference: Engine,
    tokenizer: ClipTokenizer,
    progress: Progress,
) -> Iterator[Comparison]:
    progress(str(stage))
    rng = np.random.default_rng(0)
    if stage is Stage.TEXT_ENCODER:
        tokens = tokenizer(PROMPTS)
        cases = [{"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}]
    else:
        cases = [stage_inputs(entry, sizes, rng) for sizes in CASES[stage]]
    results = []
    for runs in (reference, engine):  # one after the other: two copies of the weights may not fit
        runner = runs.load(stage)
        results.append([runner(case) for case in cases])
        runner.close()
    computed = _coarser(entry.precision, engine.precision)
    tolerance = max(STAGE_TOLERANCE[computed], QUANTIZED_TOLERANCE[entry.quantization])
    for sizes, expected, found in zip(CASES[stage], *results, strict=True):
        label = ", ".join(f"{dim} {size}" for dim, size in sizes.items())
        for name, tensor in expected.items():
            yield compare(f"{stage}: {name} ({label})", found[name], tensor, tolerance)


def _compare_trajectories(
    engine: Engine, reference: Engine, manifest: Manifest, tokenizer: ClipTokenizer, progress: Progress
) -> tuple[list[Comparison], float]:
    """The latents after every step of both samplers, and the PSNR of the final image in dB."""
    tapes, images = [], []
    for runs in (reference, engine):
        progress(f"trajectory on {runs.name}")
        tape: dict[str, NDArray[np.float32]] = {}

        def record(stage: Stage, step: Step, tape: dict[str, NDArray[np.float32]] = tape) -> None:
            tape[f"{stage} step {step.index + 1}"] = step.latents

        with Cascade(runs, manifest, tokenizer, memory=STAGED) as cascade:
            result = cascade.generate(PROMPTS[1], negative=NEGATIVE, seed=0, settings=TRAJECTORY, on_step=record)
        assert result.pixels is not None
        images.append(result.pixels)
        tapes.append(tape)
    expected, found = tapes
    tolerance, _ = _limits(engine, manifest)
    comparisons = [compare(f"trajectory: {n}", found[n], expected[n], tolerance) for n in expected]
    comparisons.append(compare("trajectory: image", images[1], images[0], tolerance))
    return comparisons, psnr(images[1], images[0])
