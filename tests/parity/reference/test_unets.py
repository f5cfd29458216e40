"""Prior and decoder against diffusers' StableCascadeUNet with the same weights."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import diffusers
import pytest
import torch

from cascadekit.parity.reference import load_reference
from cascadekit.schemas.config_json import to_json
from cascadekit.schemas.stages import PRESETS, Stage, UNetConfig, Variant, decoder_config, prior_config
from cascadekit.schemas.tensors import expected_tensors
from helpers.combinations import combinations

TEXT, POOLED = 24, 12

LITE_PRIOR = prior_config((64, 64), (1, 1), (1, 3), text=TEXT, pooled=POOLED)
WIDE_PRIOR = prior_config((64, 128), (1, 2), (2, 1), text=TEXT, pooled=POOLED)
PRIORS = {
    "tiny": PRESETS[Stage.PRIOR, Variant.TINY],
    "lite-like": LITE_PRIOR,
    "widths": WIDE_PRIOR,
    "repeats": replace(WIDE_PRIOR, down_blocks_repeat_mappers=(2, 3), up_blocks_repeat_mappers=(2, 3)),
}

FULL_DECODER = decoder_config(
    (16, 32, 64, 64), (0, 0, 1, 1), (1, 2, 3, 2), (3, 3, 2, 2), conditioning=48, pooled=POOLED
)
LITE_DECODER = decoder_config(
    (16, 24, 64, 128), (0, 9, 1, 2), (2, 1, 2, 1), (2, 2, 2, 2), conditioning=40, pooled=POOLED
)
DECODERS = {
    "tiny": PRESETS[Stage.DECODER, Variant.TINY],
    "full-like": FULL_DECODER,
    "lite-like": LITE_DECODER,
    "down repeats": replace(
        LITE_DECODER, down_blocks_repeat_mappers=(1, 2, 1, 3), up_blocks_repeat_mappers=(4, 1, 3, 2)
    ),
}

# Latent height and width, text tokens, images.
PRIOR_SHAPES: list[tuple[int, ...]] = [(5, 7, 77, 1), (12, 9, 11, 3), (1, 1, 1, 2)]
# Latent height and width, effnet height and width. Levels of 18x26: 9x13, 4x6, 2x3, 1x1.
DECODER_SHAPES: list[tuple[int, ...]] = [(18, 26, 3, 5), (34, 22, 9, 7), (16, 16, 1, 1), (32, 48, 12, 18)]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

Oracle = Callable[[UNetConfig], Any]


@pytest.fixture(scope="module")
def oracle(randomised: Callable[..., Any]) -> Oracle:
    """A function for diffusers' network of a config with random weights, in float32; made once, copied per use."""

    @cache
    def build(config: UNetConfig) -> Any:
        return randomised(diffusers.StableCascadeUNet.from_config(to_json(config)))

    return lambda config: copy.deepcopy(build(config))


def prior_inputs(config: UNetConfig, height: int, width: int, tokens: int, images: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(height * 100 + width)
    return {
        "sample": torch.randn(2, 16, height, width, generator=generator),
        "timestep_ratio": torch.tensor([0.95, 0.31]),
        "clip_text_pooled": torch.randn(2, 1, config.clip_text_pooled_in_channels, generator=generator),
        "clip_text": torch.randn(2, tokens, config.clip_text_in_channels or 0, generator=generator),
        "clip_img": torch.randn(2, images, config.clip_image_in_channels or 0, generator=generator),
    }


def decoder_inputs(config: UNetConfig, height: int, width: int, eh: int, ew: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(height * 100 + width)
    return {
        "sample": torch.randn(2, 4, height, width, generator=generator),
        "timestep_ratio": torch.tensor([0.95, 0.31]),
        "clip_text_pooled": torch.randn(2, 1, config.clip_text_pooled_in_channels, generator=generator),
        "effnet": torch.randn(2, 16, eh, ew, generator=generator),
    }


def both(theirs: Any, config: UNetConfig, inputs: dict[str, Any], dtype: Any) -> tuple[Any, Any]:
    """Our noise_pred and diffusers', from the same weights and inputs, everything in `dtype`."""
    theirs = theirs.to(dtype)
    ours = load_reference(config, theirs.state_dict(), dtype)
    inputs = {name: value.to(dtype) for name, value in inputs.items()}
    with torch.no_grad():
        return ours(**inputs)["noise_pred"], theirs(**inputs).sample


@pytest.mark.parametrize("config", [*PRIORS.values(), *DECODERS.values()], ids=[*PRIORS, *DECODERS])
def test_diffusers_has_the_expected_tensors(oracle: Oracle, config: UNetConfig) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in oracle(config).state_dict().items()}
    assert shapes == expected_tensors(config)


def named(shapes: list[tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {str(shape): shape for shape in shapes}


@pytest.mark.parametrize(("config", "shape", "dtype"), combinations(PRIORS, named(PRIOR_SHAPES), DTYPES))
def test_prior(
    oracle: Oracle, difference: Callable[..., float], config: UNetConfig, shape: tuple[int, ...], dtype: Any
) -> None:
    ours, theirs = both(oracle(config), config, prior_inputs(config, *shape), dtype)
    assert difference(ours, theirs) == 0  # bit for bit: the same operations in the same order


@pytest.mark.parametrize(("config", "shape", "dtype"), combinations(DECODERS, named(DECODER_SHAPES), DTYPES))
def test_decoder(
    oracle: Oracle, difference: Callable[..., float], config: UNetConfig, shape: tuple[int, ...], dtype: Any
) -> None:
    ours, theirs = both(oracle(config), config, decoder_inputs(config, *shape), dtype)
    assert difference(ours, theirs) == 0


def test_prior_in_double(oracle: Oracle, difference: Callable[..., float]) -> None:
    ours, theirs = both(oracle(WIDE_PRIOR), WIDE_PRIOR, prior_inputs(WIDE_PRIOR, 5, 7, 77, 2), torch.float64)
    assert difference(ours, theirs) == 0


@pytest.mark.parametrize("shape", DECODER_SHAPES, ids=str)
def test_decoder_in_double_keeps_what_the_skip_resize_of_diffusers_loses(
    oracle: Oracle, difference: Callable[..., float], shape: tuple[int, ...]
) -> None:
    ours, theirs = both(oracle(FULL_DECODER), FULL_DECODER, decoder_inputs(FULL_DECODER, *shape), torch.float64)
    # Where a level halves an odd size, diffusers rounds to float32 (6e-8), and the levels above amplify that.
    resized = shape[0] % 16 or shape[1] % 16
    assert difference(ours, theirs) <= (5e-6 if resized else 0)


def test_single_precision_is_near_double(oracle: Oracle, difference: Callable[..., float]) -> None:
    """The comparisons mean something only while the random networks do not blow rounding up."""
    for config, inputs in (
        (WIDE_PRIOR, prior_inputs(WIDE_PRIOR, 5, 7, 77, 2)),
        (FULL_DECODER, decoder_inputs(FULL_DECODER, 18, 26, 3, 5)),
    ):
        single, double = (both(oracle(config), config, inputs, dtype)[0] for dtype in (torch.float32, torch.float64))
        assert difference(single.double(), double) < 1e-3


@pytest.mark.parametrize(
    "name",
    [
        "down_blocks.0.0.channelwise.2.beta",
        "up_blocks.1.0.channelwise.2.gamma",
        "up_blocks.2.0.depthwise.bias",
        "up_blocks.3.1.mapper_sca.bias",
        "down_blocks.2.2.attention.to_v.bias",
        "up_blocks.0.2.kv_mapper.1.bias",
        "up_repeat_mappers.0.1.weight",
        "down_downscalers.3.1.bias",
        "up_upscalers.1.1.weight",
        "clip_txt_pooled_mapper.bias",
        "effnet_mapper.0.bias",
        "pixels_mapper.2.bias",
        "clf.1.bias",
    ],
)
def test_one_wrong_value_is_seen(oracle: Oracle, difference: Callable[..., float], name: str) -> None:
    theirs = oracle(FULL_DECODER)
    weights = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}
    weights[name].view(-1)[0] += 0.3
    inputs = decoder_inputs(FULL_DECODER, 18, 26, 3, 5)
    with torch.no_grad():
        ours = load_reference(FULL_DECODER, weights)(**inputs)["noise_pred"]
        # The deepest levels weigh least in the result. Rounding in float32 would stay below this, see above.
        assert difference(ours, theirs(**inputs).sample) > 1e-5


def test_a_skip_given_in_the_first_pass_only_is_seen(oracle: Oracle, difference: Callable[..., float]) -> None:
    """The skip half of a repeated block's weights matters in every pass, so leaving it out must show."""
    theirs = oracle(FULL_DECODER)
    ours = load_reference(FULL_DECODER, theirs.state_dict())
    block, width = ours.get_submodule("up_blocks.2.0"), FULL_DECODER.block_out_channels[1]
    calls: list[int] = []

    def forget_skip(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        calls.append(arguments[0].shape[1])
        x, skip = arguments
        return (x, skip) if len(calls) == 1 else (x, torch.zeros_like(skip))

    block.register_forward_pre_hook(forget_skip)
    inputs = decoder_inputs(FULL_DECODER, 18, 26, 3, 5)
    with torch.no_grad():
        assert difference(ours(**inputs)["noise_pred"], theirs(**inputs).sample) > 1e-4
    assert calls == [width, width]
