"""Fits a prior, decoder or VQGAN into fp16: exponents for its streams, and blocks that must compute in fp32."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import ExportError
from .precision import FP16_MAX
from .stages import Block, Stage, UNetConfig
from .unet_blocks import blocks_of, stream_of, streams_of

MARGIN_BITS = 2  # a value may grow fourfold beyond what calibration has seen
# Values inside a block. The norm is over all pixels; graphs for ONNX Runtime compute it in fp16.
INSIDE = ("channelwise.0", "channelwise.1", "channelwise.2/norm", "attention/scores")
VQGAN_STREAM = "up_blocks"  # the image on its way through the VQGAN's decoder
VQGAN_ENCODER_STREAM = "down_blocks"  # and through its encoder
VQGAN_PARTS = {VQGAN_STREAM: ("up_blocks.", "out_block."), VQGAN_ENCODER_STREAM: ("in_block.", "down_blocks.")}
# Values that have no exponent: inside perceptrons, and the encoder's last product.
VQGAN_HIDDEN = re.compile(r".*\.channelwise\.[01]|down_blocks\.\d+\.0")
MAX_EXPONENT = 12  # 2^-12 of a value of size 1 is still a normal fp16 number


@dataclass(frozen=True)
class Fp16Fit:
    """The changes that keep a network within fp16's range.

    | field | content |
    |---|---|
    | exponents | stream -> k, for streams that carry 2^-k of their values |
    | fp32_blocks | residual blocks that compute in fp32 |
    | margins | block -> bits between its largest value and fp16's largest number; negative means overflow |
    """

    exponents: dict[str, int]
    fp32_blocks: frozenset[str]
    margins: dict[str, float]

    def tightest(self, count: int = 5) -> list[tuple[str, float]]:
        """The blocks with the least margin, tightest first."""
        return sorted(self.margins.items(), key=lambda item: item[1])[:count]


def fit_fp16(config: UNetConfig, ranges: Mapping[str, float], *, fixed: int | None = None) -> Fp16Fit:
    """Choose exponents and fp32 blocks for measured magnitudes.

    `ranges` maps a value's name, such as "up_blocks.1.0", to the largest magnitude that was measured. `fixed` is one
    exponent for every stream; None gives each stream the least exponent that fits. The largest value stays MARGIN_BITS
    below the end of the range.

    Raises ExportError when no exponent helps, or a measured value is infinite or NaN."""
    _require_finite(config.stage, ranges)
    limit = FP16_MAX / 2**MARGIN_BITS
    peaks = dict.fromkeys(streams_of(config), 0.0)
    for block in blocks_of(config):
        stream = _stream(config, block.name)
        peaks[stream] = max(peaks[stream], ranges.get(block.name, 0.0))
    exponents = {s: fixed if fixed is not None else _exponent(peak, limit) for s, peak in peaks.items()}
    too_large = [stream for stream, exponent in exponents.items() if not 0 <= exponent <= MAX_EXPONENT]
    if too_large:
        raise ExportError(
            f"{config.stage}: the stream {too_large[0]} reaches {peaks[too_large[0]]:.3g}, which no exponent from 0 to "
            f"{MAX_EXPONENT} brings into fp16; export it as bf16"
        )
    wide, margins = set(), {}
    for block in blocks_of(config):
        scale = 2.0 ** -exponents[_stream(config, block.name)]
        inside = _inside(block.name, ranges, scale)
        if block.kind is Block.RES and inside > limit:
            wide.add(block.name)
            inside = 0.0
        margins[block.name] = _bits(max(inside, ranges.get(block.name, 0.0) * scale))
    scores = [name for name in margins if margins[name] < 0]
    if scores:
        raise ExportError(
            f"{config.stage}: values of {scores[0]} reach beyond fp16 whatever the exponent; export it as bf16"
        )
    return Fp16Fit({s: e for s, e in exponents.items() if e}, frozenset(wide), margins)


def fit_vqgan(ranges: Mapping[str, float], *, fixed: int | None = None) -> Fp16Fit:
    """The exponents of the image in both halves of the VQGAN for measured magnitudes; `ranges` and `fixed` as for
    `fit_fp16`.

    Hidden values of its perceptrons have no exponent. Raises ExportError when these are too large, when no exponent
    helps, or when a measured value is infinite or NaN."""
    _require_finite(Stage.VQGAN, ranges)
    limit = FP16_MAX / 2**MARGIN_BITS
    exponents: dict[str, int] = {}
    margins: dict[str, float] = {}
    for stream, prefixes in VQGAN_PARTS.items():
        own = {name: value for name, value in ranges.items() if name.startswith(prefixes)}
        hidden = {name: value for name, value in own.items() if VQGAN_HIDDEN.fullmatch(name)}
        peak = max((value for name, value in own.items() if name not in hidden), default=0.0)
        inside = max(hidden.values(), default=0.0)
        exponent = fixed if fixed is not None else _exponent(peak, limit)
        if not 0 <= exponent <= MAX_EXPONENT or inside > limit:
            raise ExportError(
                f"{Stage.VQGAN}: in its {stream} the image reaches {peak:.3g}, hidden values {inside:.3g}, "
                'which do not fit into fp16; set precisions={"vqgan": "fp32"}'
            )
        exponents |= {stream: exponent} if exponent else {}
        margins |= {name: _bits(value * (1 if name in hidden else 2.0**-exponent)) for name, value in own.items()}
    return Fp16Fit(exponents, frozenset(), margins)


def _require_finite(stage: Stage, ranges: Mapping[str, float]) -> None:
    broken = [name for name, value in ranges.items() if not math.isfinite(value)]
    if broken:
        raise ExportError(f"{stage}: calibration met infinite values at {broken[0]}; are the weights sound?")


def _stream(config: UNetConfig, block: str) -> str:
    return stream_of(config, block.rpartition(".")[0])


def _exponent(peak: float, limit: float) -> int:
    return max(0, math.ceil(math.log2(peak / limit))) if peak > 0 else 0


def _inside(block: str, ranges: Mapping[str, float], scale: float) -> float:
    """The largest value inside a block: hidden values of the perceptron and their norms, or attention scores.

    Only the values after the response norm shrink with the stream's `scale`."""
    plain = [f"{block}.{part}" for part in INSIDE]
    return max(*(ranges.get(name, 0.0) for name in plain), ranges.get(f"{block}.channelwise.2", 0.0) * scale)


def _bits(value: float) -> float:
    return math.log2(FP16_MAX / value) if value > 0 else math.inf
