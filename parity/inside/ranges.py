"""Measures how large the reference's activations grow in each block, and chooses a precision for each stage.

The errors it predicts for a precision are checked: the reference also computes in fp16, in bf16 and with fp8 products.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_dtypes import bfloat16, finfo, float8_e4m3fn

from ...runtime.engines.protocol import Tensors
from ...runtime.text.tokenizer import ClipTokenizer
from ...schemas.config_json import from_json
from ...schemas.errors import ExportError
from ...schemas.fp16 import MARGIN_BITS, Fp16Fit, fit_fp16
from ...schemas.manifest import StageEntry
from ...schemas.messages import listed
from ...schemas.precision import FP16_MAX, Precision
from ...schemas.quantization import Quantization
from ...schemas.stages import Stage, UNetConfig
from ...storage.bundle import Bundle
from ..compare import relative_l2
from ..reference_run import embed_prompts
from ..sample_inputs import StageInput, make_inputs_at
from ..tolerances import COMPUTE_DTYPES, ROUNDOFF
from .module_map import PASS, block_of

if TYPE_CHECKING:
    from ..reference.torch_engine import TorchEngine, TorchStage

TIMESTEPS = (0.99, 0.75, 0.5, 0.25, 0.01)
LOST_BITS = 1.0  # a block is named when its usual values lose more bits
INFINITE = float("inf")
FP8 = str(Quantization.FP8)  # E4M3

# The precisions that a type's error is predicted from; the first with a finite error is used.
PREDICTED_FROM: Mapping[str, tuple[Precision, ...]] = {
    "fp16": (Precision.BF16,),
    "bf16": (Precision.FP16, Precision.FP32),
    FP8: (Precision.BF16,),
}
# The floating-point types. Values of fp8 are first multiplied by its largest number over their own largest magnitude.
TYPES = {"fp16": np.float16, "bf16": bfloat16, FP8: float8_e4m3fn}
FORMATS: Mapping[str, Any] = {name: finfo(kind) for name, kind in TYPES.items()}  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class BlockRange:
    """The magnitudes of a block's values.

    `max_abs` is the largest, and `where` is the module that gives it. `usual` is the smallest root mean square of a
    module's values, and `usual_max` the largest magnitude of that module's values."""

    name: str
    max_abs: float
    where: str
    usual: float
    usual_max: float

    @property
    def margin(self) -> float:
        """Bits between the block's largest value and that of fp16; negative when the block overflows fp16."""
        return math.log2(FP16_MAX / self.max_abs) if self.max_abs else INFINITE

    def overflows(self, kind: str) -> bool:
        return kind != FP8 and not self.max_abs <= float(FORMATS[kind].max)

    def lost(self, kind: str) -> float:
        """Bits that the usual value of the module with the smallest values loses as a subnormal number."""
        form = FORMATS[kind]
        usual = self.usual * (float(form.max) / self.usual_max if kind == FP8 and self.usual_max else 1.0)
        return max(0.0, math.log2(float(form.smallest_normal) / usual)) if usual > 0 else 0.0


@dataclass(frozen=True)
class PrecisionError:
    """Relative L2 against float64 of a stage in one precision, and of its worst block given exact inputs.

    A predicted error is the measured error of another type, multiplied by how much coarser this one is. It holds if
    nothing overflows. A measured error of None is infinite."""

    predicted: float
    measured: float | None
    worst: str
    worst_predicted: float
    worst_measured: float | None


@dataclass(frozen=True)
class RangeAdvice:
    """The ranges of a stage's activations and the precision that suits them.

    `plan` keeps the stage's sums in the range of fp16. It is None for stages other than prior and decoder, and where no
    plan helps; `obstacle` is then the reason."""

    stage: Stage
    computed: Precision  # the precision of the bundle's graph
    blocks: tuple[BlockRange, ...]
    errors: dict[str, PrecisionError]
    plan: Fp16Fit | None
    obstacle: str = ""  # why there is no plan

    @property
    def precision(self) -> Precision:
        """fp16 where all values fit with MARGIN_BITS to spare, or a plan makes them fit; else bf16."""
        fits = all(block.margin >= MARGIN_BITS for block in self.blocks)
        return Precision.FP16 if fits or self.plan is not None else Precision.BF16

    @property
    def exponent(self) -> int | None:
        """The smallest `fp16_safe` of `export` that suffices; None where nothing has to be scaled."""
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
                lines.append(f"{self.stage} in {kind}: {listed(over)} overflow")
            if losing:
                lines.append(f"{self.stage} in {kind}: {listed(losing)} lose more than {LOST_BITS:g} bit")
        if self.obstacle:
            lines.append(f"{self.stage}: {self.obstacle}")
        return lines

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


def export_arguments(advices: Sequence[RangeAdvice]) -> dict[str, Any]:
    """The arguments of `export` that give every stage the precision that suits it: `precisions` and `fp16_safe`."""
    exponents = [advice.exponent for advice in advices if advice.exponent is not None]
    # One number holds for all stages, so with several stages export has to measure each.
    safe = {"fp16_safe": exponents[0] if len(exponents) == 1 else "auto"} if exponents else {}
    return {"precisions": {advice.stage: advice.precision for advice in advices}, **safe}


def advise(bundle: Bundle, stage: Stage, reference: "TorchEngine") -> RangeAdvice:
    """Measure the stage's activations over prompts and timesteps, and choose a precision for it.

    `reference` is a `TorchEngine` of cascadekit's modules. Raises EngineError when the stage cannot be loaded."""
    entry, tokenizer = bundle.entry(stage), ClipTokenizer.open(bundle.tokenizer)
    inputs = make_inputs_at(stage, entry, tokenizer, TIMESTEPS, embed_prompts(reference, tokenizer))
    with reference.load(stage) as runner:
        spreads = watch_spreads(runner, inputs)
        errors = _errors(runner, inputs[len(inputs) // 2].inputs)
    plan, obstacle = _plan(entry, stage, spreads)
    return RangeAdvice(stage, entry.precision, tuple(_blocks(spreads)), errors, plan=plan, obstacle=obstacle)


def watch_spreads(runner: "TorchStage", inputs: Sequence[StageInput]) -> dict[str, tuple[float, float]]:
    """The largest magnitude and the smallest root mean square of every module over all inputs and passes."""
    found: dict[str, tuple[float, float]] = {}
    for each in inputs:
        for name, (largest, usual) in runner.spreads(each.inputs).items():
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
        if any(other.startswith(f"{block}.") for other in modules):  # a module that contains blocks is not a block
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


def _errors(runner: "TorchStage", inputs: Tensors) -> dict[str, PrecisionError]:
    """The errors of the stage and of its worst block in each type of FORMATS; blocks get exact inputs."""
    names = [name for name in runner.shapes(inputs) if not block_of(name)[1]]
    blocks = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
    exact_outputs = runner(inputs, "float64")
    exact = runner.watch(inputs, blocks, compute="float64")
    stages: dict[str, float] = {}
    own: dict[str, dict[str, float]] = {}
    for kind in (*Precision, Quantization.FP8):
        dtype = COMPUTE_DTYPES[kind]
        outputs = runner(inputs, dtype)
        stages[kind] = max(relative_l2(outputs[name], exact_outputs[name]) for name in exact_outputs)
        found = runner.watch(inputs, blocks, exact, dtype)
        own[kind] = {name: relative_l2(found[name], exact[name]) for name in exact}
    return {kind: _error(kind, stages, own) for kind in FORMATS}


def _error(kind: str, stages: Mapping[str, float], own: Mapping[str, Mapping[str, float]]) -> PrecisionError:
    source = next(other for other in PREDICTED_FROM[kind] if math.isfinite(stages[other]))
    coarser = float(FORMATS[kind].eps) / 2 / ROUNDOFF[source]
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
