"""The phases of the GPU benchmark, in the order of their worth: what comes last is left out if time is short."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ...schemas.precision import Precision
from ...schemas.stages import Stage, Variant

STAGES = (Stage.PRIOR, Stage.DECODER, Stage.VQGAN, Stage.TEXT_ENCODER)
SAMPLED = (Stage.PRIOR, Stage.DECODER)
SIZES = (Variant.LITE, Variant.FULL)
ENGINE = "onnxruntime"
PACKAGES = "aotinductor"  # an engine whose packages are built first


@dataclass(frozen=True)
class Phase:
    """One phase, which runs in a process of its own for at most `limit` seconds.

    `work` is a function of `work.WORK`; the other fields are its subject."""

    name: str
    work: str
    limit: int
    variant: Variant
    stage: Stage | None = None
    precision: Precision | None = None
    engine: str = ENGINE
    cuda_graph: bool = True
    tf32: bool = False


def plan(variants: Sequence[Variant], precisions: Sequence[Precision], engines: Sequence[str]) -> tuple[Phase, ...]:
    """All phases: the first precision of every variant, the others of the first variant, of the next, torch.compile.

    VQGAN and text encoder are the same in all variants, and are measured with the first."""
    stages = {variant: SAMPLED if number else STAGES for number, variant in enumerate(variants)}
    phases: list[Phase] = []
    for variant in variants:
        phases += _made(variant, stages[variant])
        phases += _measured(variant, stages[variant], precisions[0], engines, graphs=True)
    for variant in variants:
        for precision in precisions[1:]:
            phases += _measured(variant, stages[variant], precision, engines, graphs=False)
    return (*phases, *(phase for variant in variants for phase in _compiled(variant)))


def _made(variant: Variant, stages: Sequence[Stage]) -> Iterator[Phase]:
    yield Phase(f"make {variant}", "make", 120, variant)
    for stage in stages:
        yield Phase(f"diffusers {variant} {stage}", "diffusers", 90, variant, stage)


def _measured(
    variant: Variant, stages: Sequence[Stage], precision: Precision, engines: Sequence[str], *, graphs: bool
) -> Iterator[Phase]:
    """The phases of one bundle, from its export until its files are removed: what `generate` runs, then variations.

    With `graphs` one of them shows what CUDA graphs save."""
    yield Phase(f"export {variant} {precision}", "export", 120, variant, precision=precision)
    for engine in engines:
        if engine == PACKAGES:
            yield Phase(f"build {variant} {precision}", "build", 300, variant, precision=precision, engine=engine)
        for stage in stages:
            yield _engine(variant, stage, precision, engine)
        name = f"image {variant} {precision} {engine}"
        yield Phase(name, "image", 120, variant, precision=precision, engine=engine)
    for stage in SAMPLED if ENGINE in engines else ():
        phase = _engine(variant, stage, precision, ENGINE)
        if graphs:
            yield replace(phase, name=f"{phase.name} without CUDA graph", cuda_graph=False)
        if precision is Precision.FP32:
            yield replace(phase, name=f"{phase.name} with TF32", tf32=True)
    yield Phase(f"remove {variant} {precision}", "remove", 30, variant, precision=precision)


def _engine(variant: Variant, stage: Stage, precision: Precision, engine: str) -> Phase:
    """The stage as `generate` runs it."""
    return Phase(f"engine {variant} {precision} {engine} {stage}", "engine", 90, variant, stage, precision, engine)


def _compiled(variant: Variant) -> Iterator[Phase]:
    for stage in SAMPLED:
        yield Phase(f"compile {variant} {stage}", "compile", 240, variant, stage)
