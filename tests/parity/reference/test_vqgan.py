"""Both halves of the VQGAN against diffusers' PaellaVQModel with the same weights."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen import modeling_paella_vq_model as paella

from cascadekit.parity.reference import load_reference, load_vqgan_encoder
from cascadekit.schemas.config_json import to_json
from cascadekit.schemas.stages import ORIGINAL_VQGAN_SCALE, VQGANConfig
from cascadekit.schemas.tensors import expected_tensors
from helpers.combinations import combinations

TINY = VQGANConfig(bottleneck_blocks=2, embed_dim=32, num_vq_embeddings=64)
CONFIGS = {
    "tiny": TINY,
    "original scale": replace(TINY, scale_factor=ORIGINAL_VQGAN_SCALE),
    "three levels": VQGANConfig(bottleneck_blocks=3, embed_dim=48, levels=3, num_vq_embeddings=8),
    "one level, patch 4": VQGANConfig(bottleneck_blocks=1, embed_dim=16, levels=1, up_down_scale_factor=4),
}
SHAPES = {"5x7": (5, 7), "18x26": (18, 26), "1x1": (1, 1)}
CASES = combinations(CONFIGS, SHAPES, [torch.float32, torch.bfloat16, torch.float16, torch.float64])


def both(theirs: Any, config: VQGANConfig, latents: Any, dtype: Any, **changed: Any) -> tuple[Any, Any]:
    """Our images and diffusers', scaled and clamped as its decoder pipeline does; `changed` are weights of ours."""
    theirs, latents = theirs.to(dtype), latents.to(dtype)
    ours = load_reference(config, {**theirs.state_dict(), **changed}, dtype)
    with torch.no_grad():
        return ours(latents=latents)["images"], theirs.decode(config.scale_factor * latents).sample.clamp(0, 1)


@pytest.fixture(scope="module")
def oracle(randomised: Callable[..., Any]) -> Callable[[VQGANConfig], Any]:
    return lambda config: randomised(paella.PaellaVQModel.from_config(to_json(config)))


@pytest.mark.parametrize(("config", "shape", "dtype"), CASES)
def test_images(
    oracle: Callable[..., Any],
    difference: Callable[..., float],
    config: VQGANConfig,
    shape: tuple[int, int],
    dtype: Any,
) -> None:
    latents = torch.randn(2, 4, *shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = both(oracle(config), config, latents, dtype)
    assert difference(ours, theirs) == 0
    inside = (theirs > 0) & (theirs < 1)
    assert 0.2 < inside.float().mean() < 0.9  # enough is compared, and the clamp has work


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_diffusers_has_the_expected_tensors(oracle: Callable[..., Any], config: VQGANConfig) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in oracle(config).state_dict().items()}
    assert shapes == expected_tensors(config)


@pytest.mark.parametrize("name", ["up_blocks.0.0.bias", "up_blocks.3.weight", "up_blocks.4.channelwise.2.bias"])
def test_one_wrong_value_is_seen(oracle: Callable[..., Any], difference: Callable[..., float], name: str) -> None:
    theirs = oracle(TINY)
    wrong = theirs.state_dict()[name].clone()
    wrong.view(-1)[0] += 0.3
    latents = torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(1))
    assert difference(*both(theirs, TINY, latents, torch.float32, **{name: wrong})) > 1e-4


@pytest.mark.parametrize("index", range(6))
def test_one_wrong_gamma_is_seen(oracle: Callable[..., Any], difference: Callable[..., float], index: int) -> None:
    theirs = oracle(TINY)
    wrong = theirs.state_dict()["up_blocks.1.gammas"].clone()
    wrong[index] += 0.3
    latents = torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(1))
    assert difference(*both(theirs, TINY, latents, torch.float32, **{"up_blocks.1.gammas": wrong})) > 1e-4


def encoded(theirs: Any, config: VQGANConfig, images: Any, dtype: Any, **changed: Any) -> tuple[Any, Any]:
    """Our latents and diffusers' of the same images; `changed` are weights of ours."""
    theirs, images = theirs.to(dtype), images.to(dtype)
    ours = load_vqgan_encoder(config, {**theirs.state_dict(), **changed}, dtype)
    with torch.no_grad():
        found = ours(images=images)
        assert list(found) == ["latents"]
        return found["latents"], theirs.encode(images).latents


def pictures(config: VQGANConfig, height: int, width: int) -> Any:
    """Random ones whose latents are `height` x `width`."""
    factor = config.up_down_scale_factor * 2 ** (config.levels - 1)
    return torch.rand(2, 3, factor * height, factor * width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("config", "shape", "dtype"), CASES)
def test_latents(
    oracle: Callable[..., Any],
    difference: Callable[..., float],
    config: VQGANConfig,
    shape: tuple[int, int],
    dtype: Any,
) -> None:
    ours, theirs = encoded(oracle(config), config, pictures(config, *shape), dtype)
    assert difference(ours, theirs) == 0
    assert ours.shape == (2, 4, *shape)


@pytest.mark.parametrize(
    "name",
    ["in_block.1.bias", "down_blocks.1.weight", "down_blocks.2.gammas", "down_blocks.3.0.weight"]
    + [f"down_blocks.3.1.{part}" for part in ("weight", "bias", "running_mean", "running_var")],
)
def test_one_wrong_value_of_the_encoder_is_seen(
    oracle: Callable[..., Any], difference: Callable[..., float], name: str
) -> None:
    theirs = oracle(TINY)
    wrong = theirs.state_dict()[name].clone()
    wrong.view(-1)[0] += 0.3
    assert difference(*encoded(theirs, TINY, pictures(TINY, 5, 7), torch.float32, **{name: wrong})) > 1e-4
