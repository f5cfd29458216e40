"""The effnet encoder against torchvision's EfficientNetV2-S and, for its mapper, the definition of BatchNorm."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cascadekit.parity.reference import load_reference
from cascadekit.runtime.images.pictures import effnet_pixels
from cascadekit.schemas.stages import EffnetEncoderConfig
from cascadekit.schemas.tensors import expected_tensors

CONFIG = EffnetEncoderConfig()
SIZES = [(1, 3, 1, 1), (2, 3, 33, 64), (1, 3, 97, 70), (3, 3, 31, 161)]


@pytest.fixture(scope="module")
def tensors(random_weights: Callable[..., Any]) -> dict[str, Any]:
    weights: dict[str, Any] = random_weights(expected_tensors(CONFIG))
    return weights


@pytest.fixture(scope="module")
def right(tensors: dict[str, Any]) -> Any:
    """The latents of the second image."""
    with torch.no_grad():
        return load_reference(CONFIG, tensors)(pixels=images()[1])["effnet"]


def images() -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, generator=generator) for size in SIZES]


def mapped(features: Any, tensors: dict[str, Any]) -> Any:
    """The 1x1 convolution, and the BatchNorm without weights as its formula has it."""
    mean, variance = (tensors[f"mapper.1.running_{name}"][:, None, None] for name in ("mean", "var"))
    return (F.conv2d(features, tensors["mapper.0.weight"]) - mean) / (variance + 1e-5).sqrt()


def test_latents(
    tensors: dict[str, Any], torchvision_features: Callable[..., Any], difference: Callable[..., float]
) -> None:
    network = load_reference(CONFIG, tensors)
    features = torchvision_features(tensors, images())
    for image, expected in zip(images(), features, strict=True):
        with torch.no_grad():
            assert torch.equal(network.backbone(image), expected)  # bit for bit
            latents = network(pixels=image)["effnet"]
        assert difference(latents, mapped(expected, tensors)) <= 1e-6
        assert latents.shape == (len(image), 16, -(-image.shape[2] // 32), -(-image.shape[3] // 32))


@pytest.mark.parametrize(
    "name",
    [
        "backbone.0.0.weight",
        "backbone.1.1.block.0.1.running_var",
        "backbone.2.0.block.1.1.bias",
        "backbone.4.0.block.2.fc1.bias",
        "backbone.5.8.block.2.fc2.weight",
        "backbone.6.14.block.1.0.weight",
        "backbone.7.1.running_mean",
        "mapper.0.weight",
        "mapper.1.running_var",
    ],
)
def test_one_wrong_channel_is_seen(
    tensors: dict[str, Any], right: Any, difference: Callable[..., float], name: str
) -> None:
    changed = tensors[name].clone()
    changed[-1] += 0.3
    with torch.no_grad():
        wrong = load_reference(CONFIG, {**tensors, name: changed})(pixels=images()[1])["effnet"]
    assert difference(wrong, right) > 1e-5  # ten times what the comparison above lets pass


def test_pixels_are_normalised_like_imagenet(difference: Callable[..., float]) -> None:
    """The published numbers, channel by channel."""
    image = np.random.default_rng(0).random((2, 3, 5, 7), dtype=np.float32)
    red, green, blue = (image[:, channel].astype(np.float64) for channel in range(3))
    expected = np.stack([(red - 0.485) / 0.229, (green - 0.456) / 0.224, (blue - 0.406) / 0.225], axis=1)
    pixels = effnet_pixels(image)
    assert pixels.dtype == np.float32
    assert np.abs(pixels - expected).max() < 1e-6
