"""The previewer against the published list of its layers, written out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from cascadekit.parity.reference import load_reference
from cascadekit.schemas.stages import PreviewerConfig
from cascadekit.schemas.tensors import expected_tensors

CONFIGS = {"released": PreviewerConfig(), "small": PreviewerConfig(c_in=4, c_hidden=32, c_out=2)}


def published(c_in: int, c: int, c_out: int) -> nn.Module:
    """Triplets of a convolution, GELU and BatchNorm; 6, 12 and 18 are transposed convolutions."""
    convolutions = [
        nn.Conv2d(c_in, c, kernel_size=1),
        nn.Conv2d(c, c, kernel_size=3, padding=1),
        nn.ConvTranspose2d(c, c // 2, kernel_size=2, stride=2),
        nn.Conv2d(c // 2, c // 2, kernel_size=3, padding=1),
        nn.ConvTranspose2d(c // 2, c // 4, kernel_size=2, stride=2),
        nn.Conv2d(c // 4, c // 4, kernel_size=3, padding=1),
        nn.ConvTranspose2d(c // 4, c // 4, kernel_size=2, stride=2),
        nn.Conv2d(c // 4, c // 4, kernel_size=3, padding=1),
    ]
    blocks: list[nn.Module] = []
    for convolution in convolutions:
        blocks += [convolution, nn.GELU(), nn.BatchNorm2d(convolution.out_channels)]
    holder = nn.Module()
    holder.blocks = nn.Sequential(*blocks, nn.Conv2d(c // 4, c_out, kernel_size=1))
    return holder


@pytest.fixture(scope="module")
def oracle(randomised: Callable[..., Any]) -> Callable[[PreviewerConfig], Any]:
    return lambda config: randomised(published(config.c_in, config.c_hidden, config.c_out))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_published_layers_have_the_expected_tensors(oracle: Callable[..., Any], config: PreviewerConfig) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in oracle(config).state_dict().items()}
    assert shapes == expected_tensors(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 5, 7)], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_images(oracle: Callable[..., Any], config: PreviewerConfig, size: tuple[int, int, int], dtype: Any) -> None:
    theirs = oracle(config).to(dtype)
    ours = load_reference(config, theirs.state_dict(), dtype)
    batch, height, width = size
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, config.c_in, height, width, generator=generator).to(dtype)
    with torch.no_grad():
        raw = theirs.blocks(latents)
        images = ours(latents=latents)["images"]
    assert torch.equal(images, raw.clamp(0, 1))  # bit for bit
    assert images.shape == (batch, config.c_out, 8 * height, 8 * width)
    inside = ((raw > 0) & (raw < 1)).float().mean()
    assert 0.1 < inside < 0.9  # enough is compared, and the clamp has work


@pytest.mark.parametrize("name", ["blocks.0.bias", "blocks.5.running_mean", "blocks.18.weight", "blocks.23.bias"])
def test_one_wrong_channel_is_seen(oracle: Callable[..., Any], difference: Callable[..., float], name: str) -> None:
    config = CONFIGS["small"]
    theirs = oracle(config)
    changed = theirs.state_dict()[name].clone()
    changed[-1] += 0.3
    latents = torch.randn(2, config.c_in, 5, 7, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wrong = load_reference(config, {**theirs.state_dict(), name: changed})(latents=latents)["images"]
        assert difference(wrong, theirs.blocks(latents).clamp(0, 1)) > 1e-4
