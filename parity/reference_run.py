"""What the reference gives: computed once, kept in memory or in a file, compared with any engine.

Nothing here imports torch: any engine can be the reference, and one that computes in several precisions is measured
against itself as well.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..runtime.cascade import Cascade, Settings
from ..runtime.engines.base import Engine, HostRunner, StageRunner, Tensors
from ..runtime.memory.residency import STAGED
from ..runtime.sampling.loop import Step
from ..runtime.sampling.noise import TorchGenerator, randn
from ..runtime.text.tokenizer import ClipTokenizer
from ..schemas.bundle import MAIN_GRAPH, Manifest
from ..schemas.errors import EngineError
from ..schemas.precision import Precision
from ..schemas.quantization import Quantization
from ..schemas.stages import Stage
from .compare import relative_l2
from .image_sizes import IMAGE, Sizes
from .sample_inputs import NEGATIVE, PROMPT, PROMPTS, Case, Embedded, Size, cases_of, embed
from .tolerances import COMPUTES, Floors

Outputs = dict[str, NDArray[Any]]
Progress = Callable[[str], object]

SEED = 0
TRAJECTORY_STAGES = (Stage.TEXT_ENCODER, Stage.PRIOR, Stage.DECODER, Stage.VQGAN)
TRAJECTORY = Settings(*IMAGE, prior_steps=4, prior_guidance=4.0, decoder_steps=3, decoder_guidance=1.5)
NUDGE = 1e-3  # relative size of what is added to every output to see how errors grow


class VersatileStage(Protocol):
    """A loaded reference that computes in whatever precision is asked for."""

    def __call__(self, inputs: Tensors, compute: str | None = None) -> Outputs: ...


@dataclass(frozen=True)
class Call:
    """A forward pass that sampling made: the `number`-th of its stage."""

    stage: Stage
    number: int
    inputs: Tensors
    outputs: Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Trajectory:
    """One image drawn by the reference. `latents` are those after every step by name, such as "prior step 1"; `gains`
    by how much more these, and the "image", are off than each forward pass, relative L2. `noise` is what was drawn for
    it, where that is kept: another machine has to draw the same."""

    calls: tuple[Call, ...]
    latents: Mapping[str, NDArray[np.float32]]
    image: NDArray[np.float32]  # (1, 3, h, w) in 0..1
    gains: Mapping[str, float]
    noise: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


@dataclass(frozen=True)
class Expected:
    """What an engine is compared with. `floors` are relative L2 of the reference in each precision and quantisation
    against float64, the worst of a stage's outputs."""

    reference: str
    cases: tuple[Case, ...]
    outputs: tuple[Mapping[str, NDArray[Any]], ...]  # one for each case
    floors: Mapping[Stage, Floors] = field(default_factory=dict)
    trajectory: Trajectory | None = None

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(dict.fromkeys(case.stage for case in self.cases))


def expect(
    reference: Engine,
    manifest: Manifest,
    tokenizer: ClipTokenizer,
    stages: Sequence[Stage] = (),
    kinds: Collection[Precision | Quantization] = tuple(COMPUTES),
    progress: Progress = lambda what: None,
    sizes: Sizes | None = None,
) -> Expected:
    """Run the reference: the cases of `stages` (all of the manifest's when none are named), at `sizes` as well, and a
    trajectory when no stage was singled out and all it takes is there. Floors are measured in `kinds` on a
    stage's first case.

    One stage is in memory at a time. Raises EngineError when one cannot be loaded or run."""
    sizes = sizes or Sizes()
    embedded = embedded_by(reference, tokenizer)
    cases: list[Case] = []
    outputs: list[Outputs] = []
    floors: dict[Stage, Floors] = {}
    for stage in stages or tuple(manifest.stages):
        progress(f"{stage} on {reference.name}")
        found = cases_of(stage, manifest.stages[stage], tokenizer, embedded, sizes.points.get(stage, ()))
        with reference.load(stage) as runner:
            cases += found
            outputs += [dict(runner(case.inputs)) for case in found]
            floors[stage] = _floors(runner, found[0].inputs, kinds)
    trajectory = None
    if not stages and set(TRAJECTORY_STAGES) <= set(manifest.stages):
        trajectory = _trajectory(reference, manifest, tokenizer, progress, sizes.image)
    return Expected(reference.name, tuple(cases), tuple(outputs), floors, trajectory)


def relative(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """‖found - expected‖ / ‖expected‖; infinite where anything is not finite."""
    value = relative_l2(found, expected)
    return value if np.isfinite(value) else float("inf")


def _floors(runner: Any, inputs: Tensors, kinds: Collection[Precision | Quantization]) -> Floors:
    """None for a reference that computes in one way."""
    if not hasattr(runner, "compute"):
        return {}
    versatile: VersatileStage = runner
    exact = versatile(inputs, "float64")
    found = {}
    for kind in kinds:
        rough = versatile(inputs, COMPUTES[kind])
        found[kind] = max(relative(rough[name], exact[name]) for name in exact)
    return found


def embedded_by(reference: Engine, tokenizer: ClipTokenizer) -> Embedded | None:
    """The prompts' true embeddings, where the reference has a text encoder."""
    try:
        runner = reference.load(Stage.TEXT_ENCODER)
    except EngineError:
        return None
    with runner:
        return embed(runner, tokenizer)


# Trajectories


def _trajectory(
    reference: Engine, manifest: Manifest, tokenizer: ClipTokenizer, progress: Progress, size: Size
) -> Trajectory:
    progress(f"trajectory on {reference.name}")
    watched = _Recording(reference)
    latents, image = draw(watched, manifest, tokenizer, size)
    progress("trajectory with every pass a little off")
    nudged, nudged_image = draw(_Nudged(reference), manifest, tokenizer, size)
    gains = {name: relative(nudged[name], value) / NUDGE for name, value in latents.items()}
    gains["image"] = relative(nudged_image, image) / NUDGE
    return Trajectory(tuple(watched.calls), latents, image, gains)


def draw(
    engine: Engine, manifest: Manifest, tokenizer: ClipTokenizer, size: Size
) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.float32]]:
    """One image of `size` with guidance in both stages: the latents after every step by name, and its pixels."""
    latents: dict[str, NDArray[np.float32]] = {}
    settings = replace(TRAJECTORY, width=size[0], height=size[1])

    def record(stage: Stage, step: Step) -> None:
        latents[f"{stage} step {step.index + 1}"] = step.latents

    with Cascade(
        engine, manifest, tokenizer, memory=STAGED, checked=False
    ) as cascade:  # what is wrong, the report says
        result = cascade.generate(PROMPTS[PROMPT], negative=NEGATIVE, seed=SEED, settings=settings, on_step=record)
        assert result.pixels is not None
        return latents, result.pixels


def noise_tape(trajectory: Trajectory) -> dict[str, NDArray[np.float32]]:
    """All noise that the trajectory's seed gives, in the order it is drawn, such as "prior draw 1"."""
    generator = TorchGenerator(SEED)
    tape = {}
    for stage in (Stage.PRIOR, Stage.DECODER):
        shapes = [value.shape for name, value in trajectory.latents.items() if name.startswith(f"{stage} ")]
        for number in range(len(shapes) + 1):  # the first latents, and once a step
            tape[f"{stage} draw {number + 1}"] = randn(shapes[0], generator)
    return tape


class _Wrapped:
    """An engine whose stages' outputs pass through `_after`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.name = engine.name
        self.precision = engine.precision

    def graphs(self, stage: Stage) -> tuple[str, ...]:
        return (MAIN_GRAPH,)

    def load(self, stage: Stage, graph: str = MAIN_GRAPH) -> StageRunner:
        return _WrappedStage(self._engine.load(stage, graph), lambda fed, given: self._after(stage, fed, given))

    def _after(self, stage: Stage, inputs: Tensors, outputs: Outputs) -> Outputs:
        raise NotImplementedError


@dataclass(frozen=True)
class _WrappedStage(HostRunner):
    runner: StageRunner
    after: Callable[[Tensors, Outputs], Outputs]

    def __call__(self, inputs: Tensors) -> Outputs:
        return self.after(inputs, self.runner(inputs))

    def close(self) -> None:
        self.runner.close()


class _Recording(_Wrapped):
    """Keeps what every pass was fed and gave."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.calls: list[Call] = []

    def _after(self, stage: Stage, inputs: Tensors, outputs: Outputs) -> Outputs:
        number = sum(call.stage is stage for call in self.calls)
        self.calls.append(Call(stage, number, dict(inputs), dict(outputs)))
        return outputs


class _Nudged(_Wrapped):
    """Every output is off by NUDGE of its size, in one direction for all steps of a stage, as rounded weights are."""

    def _after(self, stage: Stage, inputs: Tensors, outputs: Outputs) -> Outputs:
        rng = np.random.default_rng([SEED, *str(stage).encode()])
        return {name: _nudged(value, rng) for name, value in outputs.items()}


def _nudged(value: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    direction = rng.standard_normal(value.shape, dtype=np.float32)
    size = np.float32(NUDGE * np.linalg.norm(value) / np.linalg.norm(direction))
    nudged: NDArray[Any] = value + size * direction
    return nudged
