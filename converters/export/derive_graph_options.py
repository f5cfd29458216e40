"""Derives the options of a stage's graphs from the options of the export; measures ranges where fp16 needs them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ...runtime.engines.onnxruntime import open_session
from ...runtime.text.tokenizer import ClipTokenizer
from ...schemas.callbacks import Say
from ...schemas.control import controlled_blocks
from ...schemas.fp16 import Fp16Fit, fit_fp16, fit_vqgan
from ...schemas.precision import Precision
from ...schemas.stages import NetworkConfig, Stage, UNetConfig, VQGANConfig
from ...storage.safetensors_reader import TensorRange
from ..onnx import GraphOptions
from .calibrate_fp16 import Inputs, measure_ranges
from .calibration_file import ranges_of
from .export_options import ExportOptions
from .fp16_overflow import overflow_warning

CALIBRATION_PROMPTS = ("an image of a shiba inu, donning a spacesuit and helmet", "blurry, low quality")


def derive_graph_options(
    config: NetworkConfig,
    tensors: Mapping[str, TensorRange],
    bundle: Path,
    options: ExportOptions,
    *,
    control: Sequence[int],
    say: Say,
) -> tuple[GraphOptions, Fp16Fit | None]:
    """The options for the graphs of one network, without quantisation, and its measured fit into fp16, if any.

    `tensors` are its weights in `bundle`. `control` are the blocks of the prior that ControlNets feed, if `options` ask
    for them.

    Raises ExportError when the network does not fit into fp16, or takes no ControlNet."""
    stage = config.stage
    derived = GraphOptions(options.precision_of(stage), options.target)
    if not isinstance(config, UNetConfig | VQGANConfig):
        return derived, None
    if options.controlnet and isinstance(config, UNetConfig) and stage is Stage.PRIOR:
        controlled_blocks(config, control)
        derived = replace(derived, control=tuple(control))
    if derived.precision is not Precision.FP16:
        return derived, None
    safe = options.fp16_safe
    if safe == "off" or (safe is None and options.calibration is None and find_spec("onnxruntime") is None):
        if isinstance(config, UNetConfig):
            say(overflow_warning(stage, tensors))
        return derived, None

    def measure() -> dict[str, float]:
        say(f"{stage}: measuring how large its values grow")
        embeddings = _embeddings(bundle, say) if isinstance(config, UNetConfig) else None
        return measure_ranges(config, tensors, embeddings, say=say)

    ranges = ranges_of(Path(options.calibration) if options.calibration else None, config, measure)
    fixed = safe if isinstance(safe, int) else None
    fit = fit_fp16(config, ranges, fixed=fixed) if isinstance(config, UNetConfig) else fit_vqgan(ranges, fixed=fixed)
    for line in describe_fit(stage, fit):
        say(line)
    return replace(derived, exponents=fit.exponents, fp32_blocks=fit.fp32_blocks), fit


def describe_fit(stage: Stage, fit: Fp16Fit) -> list[str]:
    """Lines for the user: the exponents, the blocks in fp32, and the blocks with the least margin."""
    exponents = ", ".join(f"{stream} 2^-{exponent}" for stream, exponent in fit.exponents.items()) or "none needed"
    tightest = ", ".join(f"{name} {bits:.1f}" for name, bits in fit.tightest())
    wide = ", ".join(sorted(fit.fp32_blocks)) or "none"
    return [
        f"{stage} in fp16: streams made smaller: {exponents}; perceptrons in fp32: {wide}",
        f"{stage} in fp16: bits of margin below 65504, the tightest blocks: {tightest}",
    ]


def _embeddings(bundle: Path, say: Say) -> Inputs | None:
    """Embeddings of CALIBRATION_PROMPTS by the text encoder of the same bundle; None where it is not exported yet."""
    graph = bundle / Stage.TEXT_ENCODER / "model.onnx"
    if not graph.is_file():
        say("no text encoder was exported before: the ranges are measured with normal noise in place of prompts")
        return None
    own = bundle / "tokenizer" / "tokenizer.json"
    tokens = ClipTokenizer.open(own if own.is_file() else None)(CALIBRATION_PROMPTS)
    session = open_session(graph)
    fed = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
    text, pooled = session.run(["prompt_embeds", "pooled"], fed)
    return {"clip_text": np.asarray(text), "clip_text_pooled": np.asarray(pooled)}
