"""From wishes for a stage to the options its graphs are written with; measures ranges where fp16 asks for it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from ...runtime.engines.onnxruntime import open_session
from ...runtime.text.tokenizer import ClipTokenizer
from ...schemas.control import controlled_blocks
from ...schemas.errors import UsageError
from ...schemas.fp16 import Fp16Plan, plan_fp16
from ...schemas.precision import Precision, Target
from ...schemas.stages import PROJ_BLOCKS_ENDS, NetworkConfig, Stage, UNetConfig
from ..onnx import GraphOptions, Weight
from .calibrate_fp16 import Inputs, measure_ranges
from .fp16_bound import warning

Fp16Safe = Literal["auto"] | int | None
Say = Callable[[str], object]

STORED: Mapping[Precision, str] = {Precision.FP32: "F32", Precision.FP16: "F16", Precision.BF16: "BF16"}
CALIBRATION_PROMPTS = ("an image of a shiba inu, donning a spacesuit and helmet", "blurry, low quality")


@dataclass(frozen=True)
class GraphWishes:
    """What a user asks of the graphs of an export.

    `precisions` by stage, `precision` for all others. `storage` is the precision that weights are stored in; None
    keeps them as they are in fp32 graphs and stores what a half-precision graph computes in. `fp16_safe` is for prior
    and decoder in fp16: "auto" measures ranges and gives each stream the exponent it needs, a number is the exponent
    of all. With `control` the prior takes ControlNet residuals."""

    precisions: Mapping[Stage, Precision] = field(default_factory=dict)
    precision: Precision = Precision.FP32
    target: Target = Target.PORTABLE
    storage: Precision | None = None
    fp16_safe: Fp16Safe = None
    control: bool = False

    def of(self, stage: Stage) -> Precision:
        """What the graphs of `stage` compute in."""
        return self.precisions.get(stage, self.precision)

    def stored_as(self, stage: Stage) -> str | None:
        """The dtype to store the weights in; None for that of the model."""
        if self.storage is not None:
            return STORED[self.storage]
        precision = self.of(stage)
        return None if precision is Precision.FP32 else STORED[precision]

    def require_sense(self, stages: list[Stage]) -> None:
        """Raises UsageError for wishes that no stage can fulfil."""
        fp16 = [stage for stage in (Stage.PRIOR, Stage.DECODER) if self.of(stage) is Precision.FP16]
        if self.fp16_safe is not None and not set(fp16) & set(stages):
            raise UsageError("--fp16-safe is for a prior or decoder in fp16; add --precision fp16")
        if self.control and Stage.PRIOR not in stages:
            raise UsageError("--controlnet is for the prior, which is not exported here")
        strange = [stage for stage in self.precisions if stage not in stages]
        if strange:
            raise UsageError(f"--precision {strange[0]}=...: that stage is not exported; there are {', '.join(stages)}")


def options_for(
    config: NetworkConfig, weights: Mapping[str, Weight], bundle: Path, wishes: GraphWishes, say: Say
) -> tuple[GraphOptions, Fp16Plan | None]:
    """The options for the network's graphs, whose `weights` lie in its folder of `bundle`; and the plan for fp16 where
    one was made.

    Raises ExportError when the network does not fit into fp16, or takes no ControlNet."""
    stage = config.stage
    options = GraphOptions(wishes.of(stage), wishes.target)
    if not isinstance(config, UNetConfig):
        return options, None
    if wishes.control and stage is Stage.PRIOR:
        controlled_blocks(config, PROJ_BLOCKS_ENDS)
        options = replace(options, control=PROJ_BLOCKS_ENDS)
    if options.precision is not Precision.FP16:
        return options, None
    if wishes.fp16_safe is None:
        say(warning(stage, weights, bundle / stage))
        return options, None
    say(f"{stage}: measuring how large its values grow")
    ranges = measure_ranges(config, weights, bundle / stage, _embeddings(bundle, say))
    plan = plan_fp16(config, ranges, fixed=None if wishes.fp16_safe == "auto" else wishes.fp16_safe)
    for line in described(stage, plan):
        say(line)
    return replace(options, exponents=plan.exponents, fp32_blocks=plan.fp32_blocks), plan


def described(stage: Stage, plan: Fp16Plan) -> list[str]:
    """The plan in a few lines."""
    exponents = ", ".join(f"{stream} 2^-{exponent}" for stream, exponent in plan.exponents.items()) or "none needed"
    tightest = ", ".join(f"{name} {bits:.1f}" for name, bits in plan.tightest())
    wide = ", ".join(sorted(plan.fp32_blocks)) or "none"
    return [
        f"{stage} in fp16: streams made smaller: {exponents}; perceptrons in fp32: {wide}",
        f"{stage} in fp16: bits of margin below 65504, the tightest blocks: {tightest}",
    ]


def _embeddings(bundle: Path, say: Say) -> Inputs | None:
    """What the text encoder exported beside makes of a prompt and a negative one."""
    graph = bundle / Stage.TEXT_ENCODER / "model.onnx"
    if not graph.is_file():
        say("no text encoder is exported before it: normal noise stands in for prompts")
        return None
    own = bundle / "tokenizer" / "tokenizer.json"
    tokens = ClipTokenizer.open(own if own.is_file() else None)(CALIBRATION_PROMPTS)
    session = open_session(graph)
    fed = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
    text, pooled = session.run(["prompt_embeds", "pooled"], fed)
    return {"clip_text": np.asarray(text), "clip_text_pooled": np.asarray(pooled)}
