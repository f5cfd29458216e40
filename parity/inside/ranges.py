"""How large the reference's activations grow, block by block: which precision each stage bears, and how to export it.

Predictions are checked: the reference itself computes in fp16, in bf16, and with products of fp8 numbers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from ...runtime.engines.base import Engine, Tensors
from ...runtime.text.tokenizer import ClipTokenizer
from ...schemas.bundle import StageEntry
from ...schemas.config_json import from_json
from ...schemas.errors import ExportError
from ...schemas.fp16 import MARGIN_BITS, Fp16Fit, fit_fp16
from ...schemas.precision import E4M3_MAX, FP16_MAX, Precision
from ...schemas.quantization import Quantization
from ...schemas.report import RangeEntry
from ...schemas.stages import Stage, UNetConfig
from ..reference_run import embedded_by, relative
from ..sample_inputs import Case, cases_at
from ..tolerances import COMPUTES, ROUNDOFF
from .bisect import WatchedStage
from .module_map import PASS, block_of

TIMESTEPS = (0.99, 0.75, 0.5, 0.25, 0.01)
LOST_BITS = 1.0  # a block whose usual values lose more is named
INFINITE = float("inf")


# What a type's errors are predicted from, the first that is finite: all but fp32 take sums in fp32, which rounds once.
PREDICTED_FROM: Mapping[str, tuple[Precision, ...]] = {
    "fp16": (Precision.BF16,),
    "bf16": (Precision.FP16, Precision.FP32),
    "fp8": (Precision.BF16,),
}


@dataclass(frozen=True)
class Format:
    """A floating-point type: its largest number, its smallest normal one, half the relative distance of its numbers.
    `scaled`: values are divided by their largest and multiplied by `largest` first, as fp8 is used."""

    largest: float
    smallest_normal: float
    roundoff: float
    scaled: bool = False


FORMATS: Mapping[str, Format] = {
    "fp16": Format(FP16_MAX, 2.0**-14, ROUNDOFF[Precision.FP16]),
    "bf16": Format(3.39e38, 2.0**-126, ROUNDOFF[Precision.BF16]),
    "fp8": Format(E4M3_MAX, 2.0**-6, 2.0**-4, scaled=True),  # E4M3
}


class SpreadStage(WatchedStage, Protocol):
    """A reference that tells how far values reach: `engines.torch.TorchStage`."""

    def __call__(self, inputs: Tensors, compute: str | None = None) -> dict[str, Any]: ...
    def spreads(self, inputs: Tensors) -> dict[str, tuple[float, float]]: ...


@dataclass(frozen=True)
class BlockRange:
    """What a block's values reach: the largest magnitude, which of its modules gives it, and the smallest root mean
    square of a module's values, with that value's own largest."""

    name: str
    max_abs: float
    where: str
    usual: float
    usual_max: float

    @property
    def margin(self) -> float:
        """Bits from the largest value to the end of fp16; negative beyond it."""
        return math.log2(FP16_MAX / self.max_abs) if self.max_abs else INFINITE

    def overflows(self, kind: str) -> bool:
        return not FORMATS[kind].scaled and not self.max_abs <= FORMATS[kind].largest

    def lost(self, kind: str) -> float:
        """Bits that the usual value of the block's smallest module loses as a subnormal number."""
        form = FORMATS[kind]
        usual = self.usual * (form.largest / self.usual_max if form.scaled and self.usual_max else 1.0)
        return max(0.0, math.log2(form.smallest_normal / usual)) if usual > 0 else 0.0


@dataclass(frozen=True)
class PrecisionError:
    """Relative L2 of a stage in a precision against float64, and of the block that is worst when it is given exact
    values. Predicted: the error of another type, larger by as much as this one is coarser, if nothing overflows. None:
    infinite."""

    predicted: float
    measured: float | None
    worst: str
    worst_predicted: float
    worst_measured: float | None


@dataclass(frozen=True)
class Advice:
    """What a stage bears. `plan` is how its streams are kept in fp16, None where it is no prior or decoder or no plan
    helps."""

    stage: Stage
    computed: Precision  # what the bundle's graph computes in
    blocks: tuple[BlockRange, ...]
    errors: dict[str, PrecisionError]
    plan: Fp16Fit | None
    obstacle: str = ""  # why there is no plan

    @property
    def precision(self) -> Precision:
        """fp16 where all values fit with MARGIN_BITS to spare or a plan makes them, else bf16."""
        fits = all(block.margin >= MARGIN_BITS for block in self.blocks)
        return Precision.FP16 if fits or self.plan is not None else Precision.BF16

    @property
    def exponent(self) -> int | None:
        """What --fp16-safe has to be at least; None where nothing has to be scaled."""
        if self.precision is not Precision.FP16 or self.plan is None:
            return None
        return max(self.plan.exponents.values(), default=0) or (0 if self.plan.fp32_blocks else None)

    def tightest(self, count: int) -> list[BlockRange]:
        return sorted(self.blocks, key=lambda block: block.margin)[:count]

    def described(self) -> list[str]:
        lines = []
        for kind in FORMATS:
            over = [block.name for block in self.blocks if block.overflows(kind)]
            losing = [block.name for block in self.blocks if block.lost(kind) > LOST_BITS]
            if over:
                lines.append(f"{self.stage} in {kind}: {_listed(over)} overflow")
            if losing:
                lines.append(f"{self.stage} in {kind}: {_listed(losing)} lose more than {LOST_BITS:g} bit")
        if self.obstacle:
            lines.append(f"{self.stage}: {self.obstacle}")
        return lines

    def entries(self) -> list[RangeEntry]:
        """For the report."""
        return [
            RangeEntry(stage=self.stage, name=block.name, max_abs=block.max_abs, precision=self.computed)
            for block in self.blocks
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "stage": str(self.stage),
            "precision": str(self.precision),
            "exponent": self.exponent,
            "obstacle": self.obstacle or None,
            "fp32_blocks": sorted(self.plan.fp32_blocks) if self.plan else [],
            "blocks": [
                {
                    **asdict(block),
                    "fp16_margin_bits": block.margin if math.isfinite(block.margin) else None,
                    "overflows": {kind: block.overflows(kind) for kind in FORMATS},
                    "lost_bits": {kind: block.lost(kind) for kind in FORMATS},
                }
                for block in self.blocks
            ],
            "errors": {kind: asdict(error) for kind, error in self.errors.items()},
        }


def _listed(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def export_options(advices: Sequence[Advice]) -> list[str]:
    """What to give `cascadekit export` so that every stage is in the precision it bears."""
    options = [f"--precision {advice.stage}={advice.precision}" for advice in advices]
    exponents = [advice.exponent for advice in advices if advice.exponent is not None]
    if exponents:  # one number is for all stages; where several have to be scaled, export measures for each
        options.append(f"--fp16-safe {exponents[0] if len(exponents) == 1 else 'auto'}")
    return options


def advise(entry: StageEntry, stage: Stage, reference: Engine, tokenizer: ClipTokenizer) -> Advice:
    """Watch the stage over prompts and timesteps and say what it bears. `reference` is a `TorchEngine` of cascadekit's
    modules. Raises EngineError when it cannot be loaded."""
    cases = cases_at(stage, entry, tokenizer, TIMESTEPS, embedded_by(reference, tokenizer))
    runner: Any
    with reference.load(stage) as runner:
        spreads = watch_spreads(runner, cases)
        errors = _errors(runner, cases[len(cases) // 2].inputs)
    plan, obstacle = _plan(entry, stage, spreads)
    return Advice(stage, entry.precision, tuple(_blocks(spreads)), errors, plan, obstacle)


def watch_spreads(runner: SpreadStage, cases: Sequence[Case]) -> dict[str, tuple[float, float]]:
    """The largest magnitude and the smallest root mean square of every module over all cases and passes."""
    found: dict[str, tuple[float, float]] = {}
    for case in cases:
        for name, (largest, usual) in runner.spreads(case.inputs).items():
            plain = PASS.sub("", name)
            before = found.get(plain, (0.0, INFINITE))
            found[plain] = (max(before[0], largest), min(before[1], usual or INFINITE))
    return found


def _blocks(spreads: Mapping[str, tuple[float, float]]) -> list[BlockRange]:
    modules: dict[str, dict[str, tuple[float, float]]] = {}
    for name, spread in spreads.items():
        modules.setdefault(block_of(name)[0], {})[name] = spread
    blocks = []
    for block, found in modules.items():
        if any(other.startswith(f"{block}.") for other in modules):  # what holds blocks is none
            continue
        where = max(found, key=lambda name: found[name][0])
        least = min(found, key=lambda name: found[name][1])
        usual = found[least][1] if math.isfinite(found[least][1]) else 0.0
        inside = where.removeprefix(block).lstrip("./") or "its sum"
        blocks.append(BlockRange(block, found[where][0], inside, usual, found[least][0]))
    return blocks


def _plan(entry: StageEntry, stage: Stage, spreads: Mapping[str, tuple[float, float]]) -> tuple[Fp16Fit | None, str]:
    config = from_json(stage, entry.config)
    if not isinstance(config, UNetConfig):
        return None, ""
    try:
        return fit_fp16(config, {name: largest for name, (largest, _) in spreads.items()}), ""
    except ExportError as error:
        return None, str(error)


def _errors(runner: SpreadStage, inputs: Tensors) -> dict[str, PrecisionError]:
    """By type: of the stage, and of the block that is worst, each block given exact values."""
    names = [name for name in runner.shapes(inputs) if not block_of(name)[1]]
    blocks = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
    exact_outputs = runner(inputs, "float64")
    exact = runner.watch(inputs, blocks, compute="float64")
    stages: dict[str, float] = {}
    own: dict[str, dict[str, float]] = {}
    for kind in (*Precision, Quantization.FP8):
        dtype = COMPUTES[kind]
        outputs = runner(inputs, dtype)
        stages[kind] = max(relative(outputs[name], exact_outputs[name]) for name in exact_outputs)
        found = runner.watch(inputs, blocks, exact, dtype)
        own[kind] = {name: relative(found[name], exact[name]) for name in exact}
    return {kind: _error(kind, stages, own) for kind in FORMATS}


def _error(kind: str, stages: Mapping[str, float], own: Mapping[str, Mapping[str, float]]) -> PrecisionError:
    source = next(other for other in PREDICTED_FROM[kind] if math.isfinite(stages[other]))
    coarser = FORMATS[kind].roundoff / ROUNDOFF[source]
    worst = max(own[kind], key=lambda name: own[kind][name])
    return PrecisionError(
        predicted=stages[source] * coarser,
        measured=_finite(stages[kind]),
        worst=worst,
        worst_predicted=own[source][worst] * coarser,
        worst_measured=_finite(own[kind][worst]),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
