"""The ControlNets: from a control image to the residuals that are added in front of some blocks of the prior."""

from torch import Tensor, nn

from .....schemas.ports import control_port
from .....schemas.stages import ControlNetConfig
from .....schemas.tensors import LARGE_BLOCKS, LARGE_ENTRANCE, LARGE_WIDTH
from .efficientnet import efficientnet_v2

# The slope of Stability's class. A checkpoint does not hold it, since the activation has no weights.
NEGATIVE_SLOPE = 0.2


class NormedConvolutions(nn.Module):
    """LayerNorm over the channels, GELU and a 3x3 convolution, twice, with a skip around them.

    (B, c, h, w) becomes (B, c, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*_half(channels), *_half(channels))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.blocks(x)
        return y


class ControlChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of an image (B, c, h, w), with weights and torch's own epsilon."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ControlNet(nn.Module):
    """A backbone, and a projection for each block of the prior that gets residuals; keys as in Stability's file."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        self.config = config
        match config.bottleneck_mode:
            case None:
                self.backbone = efficientnet_v2(config.c_in, config.backbone_widths, config.backbone_blocks)
            case "large":
                self.backbone = _large(config.c_in, config.width)
            case "simple":
                self.backbone = _simple(config.width)
        self.projections = nn.ModuleList(_projection(config.width, config.c_proj) for _ in config.proj_blocks)

    def forward(self, *, control_image: Tensor) -> dict[str, Tensor]:
        """The residuals ``control.N`` (B, c_proj, h, w) of ``control_image`` (B, c_in, H, W), in the weights' dtype.

        There is one for each N of the config's proj_blocks. It is to be resized to the prior's latents (bilinear,
        corners aligned) and added to the input of residual block N. An EfficientNet makes h, w smaller than H, W.
        """
        seen = self.backbone(control_image)
        pairs = zip(self.config.proj_blocks, self.projections, strict=True)
        return {control_port(block): projection(seen) for block, projection in pairs}


def _projection(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, width, kernel_size=1, bias=False),
        nn.LeakyReLU(NEGATIVE_SLOPE),
        nn.Conv2d(width, out, kernel_size=1, bias=False),
    )


def _simple(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, width * 4, kernel_size=3, padding=1),
        nn.LeakyReLU(NEGATIVE_SLOPE),
        nn.Conv2d(width * 4, width, kernel_size=3, padding=1),
    )


def _large(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, LARGE_ENTRANCE, kernel_size=1),
        nn.LeakyReLU(NEGATIVE_SLOPE),
        nn.Conv2d(LARGE_ENTRANCE, LARGE_WIDTH, kernel_size=1),
        *(NormedConvolutions(LARGE_WIDTH) for _ in range(LARGE_BLOCKS)),
        nn.Conv2d(LARGE_WIDTH, out, kernel_size=1),
    )


def _half(channels: int) -> list[nn.Module]:
    return [ControlChannelNorm(channels), nn.GELU(), nn.Conv2d(channels, channels, kernel_size=3, padding=1)]
