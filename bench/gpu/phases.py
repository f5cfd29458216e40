"""The phases of the GPU benchmark, in the order of their worth: what comes last is left out if time is short."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...schemas.precision import Precision
from ...schemas.stages import Stage, Variant

STAGES = (Stage.PRIOR, Stage.DECODER, Stage.VQGAN, Stage.TEXT_ENCODER)
SAMPLED = (Stage.PRIOR, Stage.DECODER)
SIZES = (Variant.LITE, Variant.FULL)
ENGINE = "onnxruntime"


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
    """All phases: the first precision of every variant, then the next, and torch.compile, which takes longest."""
    made = {variant: tuple(_made(variant)) for variant in variants}
    measured = [(variant, tuple(_measured(variant, each, engines))) for each in precisions for variant in variants]
    first = [phase for variant, phases in measured[: len(variants)] for phase in (*made[variant], *phases)]
    others = [phase for _, phases in measured[len(variants) :] for phase in phases]
    return (*first, *others, *(phase for variant in variants for phase in _compiled(variant)))


def _made(variant: Variant) -> Iterator[Phase]:
    yield Phase(f"make {variant}", "make", 120, variant)
    for stage in STAGES:
        yield Phase(f"diffusers {variant} {stage}", "diffusers", 90, variant, stage)


def _measured(variant: Variant, precision: Precision, engines: Sequence[str]) -> Iterator[Phase]:
    """The phases of one bundle, from its export until its files are removed."""
    yield Phase(f"export {variant} {precision}", "export", 120, variant, precision=precision)
    for engine in engines:
        for stage in STAGES:
            yield from _engine(variant, stage, precision, engine)
        name = f"image {variant} {precision} {engine}"
        yield Phase(name, "image", 120, variant, precision=precision, engine=engine)
    yield Phase(f"remove {variant} {precision}", "remove", 30, variant, precision=precision)


def _engine(variant: Variant, stage: Stage, precision: Precision, engine: str) -> Iterator[Phase]:
    """The stage as `generate` runs it, then with one thing changed."""
    name = f"engine {variant} {precision} {engine} {stage}"
    yield Phase(name, "engine", 90, variant, stage, precision, engine)
    if stage in SAMPLED and engine == ENGINE:
        yield Phase(f"{name} without CUDA graph", "engine", 90, variant, stage, precision, engine, cuda_graph=False)
        if precision is Precision.FP32:
            yield Phase(f"{name} with TF32", "engine", 90, variant, stage, precision, engine, tf32=True)


def _compiled(variant: Variant) -> Iterator[Phase]:
    for stage in SAMPLED:
        yield Phase(f"compile {variant} {stage}", "compile", 240, variant, stage)
