"""Plans that bring a network into fp16."""

import math

import pytest

from cascadekit.schemas.errors import ExportError
from cascadekit.schemas.fp16 import MAX_EXPONENT, fit_fp16
from cascadekit.schemas.stages import PRESETS, Block, Stage, UNetConfig, Variant
from cascadekit.schemas.unet_blocks import blocks_of, stream_of, streams_of

PRIOR = PRESETS[Stage.PRIOR, Variant.TINY]
assert isinstance(PRIOR, UNetConfig)
LIMIT = 65504 / 4
INSIDE = {
    Block.RES: (".channelwise.0", ".channelwise.1", ".channelwise.2"),
    Block.ATTENTION: (".attention/scores",),
}


def calm() -> dict[str, float]:
    """Every block at 100, every value inside at 10."""
    assert isinstance(PRIOR, UNetConfig)
    ranges = {}
    for block in blocks_of(PRIOR):
        ranges[block.name] = 100.0
        inside = {
            Block.RES: (".channelwise.0", ".channelwise.1", ".channelwise.2"),
            Block.ATTENTION: (".attention/scores",),
        }
        ranges |= {f"{block.name}{part}": 10.0 for part in inside.get(block.kind, ())}
    return ranges


def test_what_fits_is_left_alone() -> None:
    plan = fit_fp16(PRIOR, calm())
    assert (plan.exponents, plan.fp32_blocks) == ({}, frozenset())
    assert plan.margins["up_blocks.1.0"] == pytest.approx(math.log2(65504 / 100))
    assert plan.margins.keys() == {block.name for block in blocks_of(PRIOR)}


@pytest.mark.parametrize(
    ("peak", "exponent"), [(LIMIT, 0), (LIMIT * 1.001, 1), (2 * LIMIT, 1), (2 * LIMIT * 1.001, 2), (71_304.0, 3)]
)
def test_a_stream_gets_the_least_exponent_that_fits(peak: float, exponent: int) -> None:
    plan = fit_fp16(PRIOR, calm() | {"up_blocks.1.1": peak})
    assert plan.exponents == ({"up_blocks.1": exponent} if exponent else {})
    assert plan.margins["up_blocks.1.1"] == pytest.approx(math.log2(65504 / peak) + exponent)
    assert plan.tightest(1)[0][0] == "up_blocks.1.1"


def test_the_deepest_level_is_one_stream_down_and_up() -> None:
    assert streams_of(PRIOR) == ("down_blocks.0", "down_blocks.1", "up_blocks.1")
    assert stream_of(PRIOR, "up_blocks.0") == "down_blocks.1"
    assert fit_fp16(PRIOR, calm() | {"up_blocks.0.2": 1e5}).exponents == {"down_blocks.1": 3}


def test_a_perceptron_that_no_exponent_reaches_computes_in_fp32() -> None:
    plan = fit_fp16(PRIOR, calm() | {"up_blocks.0.0.channelwise.0": 1e5})
    assert (plan.exponents, plan.fp32_blocks) == ({}, {"up_blocks.0.0"})
    after_norm = fit_fp16(PRIOR, calm() | {"up_blocks.1.0.channelwise.2": 1e5, "up_blocks.1.0": 1e5})
    assert (after_norm.exponents, after_norm.fp32_blocks) == ({"up_blocks.1": 3}, frozenset())  # as small as the stream


def test_a_fixed_exponent_is_taken_for_all_streams() -> None:
    assert fit_fp16(PRIOR, calm(), fixed=4).exponents == dict.fromkeys(streams_of(PRIOR), 4)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"up_blocks.1.2.attention/scores": 1e5}, "up_blocks.1.2 .*bf16"),
        ({"up_blocks.1.2": 1e9}, "up_blocks.1 reaches 1e"),
        ({"down_blocks.0.0": math.inf}, "infinite values at down_blocks.0.0"),
        ({"down_blocks.0.0": math.nan}, "infinite values at down_blocks.0.0"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, float], words: str) -> None:
    with pytest.raises(ExportError, match=words):
        fit_fp16(PRIOR, calm() | changed)
    assert MAX_EXPONENT < 14  # 2^-14 is fp16's smallest normal number
