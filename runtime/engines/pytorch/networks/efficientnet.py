"""EfficientNetV2-S, the backbone of effnet encoder and ControlNets; attribute names are torchvision's key names."""

from itertools import groupby

from torch import Tensor, nn

from .....schemas.layer_tensors import EFFICIENTNET_EPSILON, InvertedResidual, inverted_residuals


class ConvNorm(nn.Sequential):
    """A convolution without bias, its BatchNorm, and a SiLU unless it is not `active`."""

    def __init__(
        self,
        into: int,
        out: int,
        kernel: int,
        stride: int = 1,
        *,
        groups: int = 1,
        padded: bool = True,
        active: bool = True,
    ) -> None:
        padding = kernel // 2 if padded else 0
        super().__init__(
            nn.Conv2d(into, out, kernel, stride, padding, groups=groups, bias=False),
            nn.BatchNorm2d(out, eps=EFFICIENTNET_EPSILON),
            *([nn.SiLU()] if active else []),
        )


class SqueezeExcitation(nn.Module):
    """Scales each channel by a factor that a perceptron computes from the means of all channels.

    (B, c, h, w) becomes (B, c, h, w)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, kernel_size=1)
        self.fc2 = nn.Conv2d(squeezed, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.silu(self.fc1(self.avgpool(x)))
        y: Tensor = self.fc2(hidden).sigmoid() * x
        return y


class ConvBlock(nn.Module):
    """One inverted residual: (B, into, h, w) to (B, out, h/stride, w/stride), rounded up."""

    def __init__(self, spec: InvertedResidual) -> None:
        super().__init__()
        self.has_skip = spec.has_skip
        self.block = nn.Sequential(*(_fused(spec) if spec.fused else _depthwise(spec)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return y + x if self.has_skip else y


def _fused(spec: InvertedResidual) -> list[nn.Module]:
    if spec.expansion == 1:
        return [ConvNorm(spec.into, spec.out, 3, spec.stride)]
    return [ConvNorm(spec.into, spec.inner, 3, spec.stride), ConvNorm(spec.inner, spec.out, 1, active=False)]


def _depthwise(spec: InvertedResidual) -> list[nn.Module]:
    return [
        ConvNorm(spec.into, spec.inner, 1),
        ConvNorm(spec.inner, spec.inner, 3, spec.stride, groups=spec.inner),
        SqueezeExcitation(spec.inner, spec.squeezed),
        ConvNorm(spec.inner, spec.out, 1, active=False),
    ]


def efficientnet_v2(channels: int, widths: tuple[int, ...], blocks: tuple[int, ...]) -> nn.Sequential:
    """(B, channels, H, W) to (B, widths[-1], H/32, W/32), rounded up; EfficientNetV2-S gives 1280 channels.

    For another number of channels, Stability's code has a new first convolution without padding. It halves a side to
    (side - 1) // 2, and the side of the output is (side + 29) // 32.
    """
    stages = [list(row) for _, row in groupby(inverted_residuals(widths, blocks), _row)]
    return nn.Sequential(
        ConvNorm(channels, widths[0], 3, stride=2, padded=channels == 3),
        *(nn.Sequential(*map(ConvBlock, blocks)) for blocks in stages),
        ConvNorm(stages[-1][-1].out, widths[-1], 1),
    )


def _row(block: InvertedResidual) -> str:
    return block.path.split(".")[0]
