"""The ControlNets against torchvision's backbone and the published rest, written with functions on named tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from cascadekit.parity.reference import load_reference
from cascadekit.schemas.stages import PROJ_BLOCKS_ENDS, ControlNetConfig
from cascadekit.schemas.tensors import expected_tensors
from helpers.efficientnets import WIDTHS, narrow_large_backbone

BLOCKS = (0, 4, 51)
SIMPLE = ControlNetConfig(512, BLOCKS, "simple", c_proj=24)
LARGE = ControlNetConfig(16, BLOCKS, "large", 24, WIDTHS)  # whose layers have the last of the widths


def conv(tensors: dict[str, Any], name: str, x: Any) -> Any:
    """Size-keeping; without a bias where the file has none."""
    weight = tensors[f"{name}.weight"]
    return F.conv2d(x, weight, tensors.get(f"{name}.bias"), padding=weight.shape[2] // 2)


def leaky(x: Any) -> Any:
    return torch.where(x > 0, x, 0.2 * x)


def normed(tensors: dict[str, Any], name: str, x: Any) -> Any:
    """LayerNorm over the channels, by its formula."""
    mean, variance = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)
    weight, bias = (tensors[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def simple(tensors: dict[str, Any], x: Any) -> Any:
    return conv(tensors, "backbone.2", leaky(conv(tensors, "backbone.0", x)))


def large(tensors: dict[str, Any], x: Any) -> Any:
    x = conv(tensors, "backbone.2", leaky(conv(tensors, "backbone.0", x)))
    for index in range(3, 11):
        name = f"backbone.{index}.blocks"
        y = conv(tensors, f"{name}.2", F.gelu(normed(tensors, f"{name}.0", x)))
        x = x + conv(tensors, f"{name}.5", F.gelu(normed(tensors, f"{name}.3", y)))
    return conv(tensors, "backbone.11", x)


def projected(tensors: dict[str, Any], blocks: tuple[int, ...], seen: Any) -> dict[str, Any]:
    return {
        f"control.{block}": conv(tensors, f"projections.{n}.2", leaky(conv(tensors, f"projections.{n}.0", seen)))
        for n, block in enumerate(blocks)
    }


def images(channels: int, *sizes: tuple[int, int, int]) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, channels, *size, generator=generator) for batch, *size in sizes]


@torch.no_grad()
@pytest.mark.parametrize("channels", [4, pytest.param(1, marks=pytest.mark.slow)], ids=["inpainting", "canny"])
def test_efficientnet(
    random_weights: Callable[..., Any],
    torchvision_features: Callable[..., Any],
    difference: Callable[..., float],
    channels: int,
) -> None:
    config = ControlNetConfig(channels, PROJ_BLOCKS_ENDS)
    tensors = random_weights(expected_tensors(config))
    network = load_reference(config, tensors)
    inputs = images(channels, (1, 3, 3), (2, 35, 66))
    for image, features in zip(inputs, torchvision_features(tensors, inputs), strict=True):
        assert torch.equal(network.backbone(image), features)  # bit for bit
        found, expected = network(control_image=image), projected(tensors, PROJ_BLOCKS_ENDS, features)
        assert list(found) == list(expected)
        assert max(difference(found[port], expected[port]) for port in expected) <= 1e-6
        assert found["control.0"].shape[2:] == tuple((side + 29) // 32 for side in image.shape[2:])


@torch.no_grad()
@pytest.mark.parametrize(("config", "backbone"), [(SIMPLE, simple), (LARGE, large)], ids=["simple", "large"])
def test_convolutions(
    random_weights: Callable[..., Any],
    difference: Callable[..., float],
    config: ControlNetConfig,
    backbone: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    narrow_large_backbone(monkeypatch)
    # In float64, where kernels that sum in another order agree to 1e-12 on every CPU.
    tensors = {name: tensor.double() for name, tensor in random_weights(expected_tensors(config)).items()}
    network = load_reference(config, tensors).double()
    for image in (image.double() for image in images(config.c_in, (1, 1, 1), (2, 5, 7))):
        found = network(control_image=image)
        expected = projected(tensors, BLOCKS, backbone(tensors, image))
        assert list(found) == list(expected)
        assert max(difference(found[port], expected[port]) for port in expected) <= 1e-12
