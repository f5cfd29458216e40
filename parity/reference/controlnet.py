"""The ControlNets: from a control image to what is added in front of some of the prior's residual blocks."""

from torch import Tensor, nn

from ...schemas.ports import control_port
from ...schemas.stages import ControlNetConfig
from ...schemas.tensors import LARGE_BLOCKS, LARGE_ENTRANCE, LARGE_WIDTH
from .efficientnet import efficientnet_v2

# Not to be seen in a checkpoint: the activation has no weights. Stability's class has this slope.
NEGATIVE_SLOPE = 0.2


class NormedConvolutions(nn.Module):
    """LayerNorm over the channels, GELU and a 3x3 convolution, twice, around them a skip: (B, c, h, w) to the same."""

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
    """A backbone and one projection for each block that is fed; keys as in Stability's file."""

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
        """``control_image`` (B, c_in, H, W) in the dtype of the weights. ``control.N`` (B, c_proj, h, w) for each
        N of the config's proj_blocks, to be resized to the prior's latents (bilinear, corners aligned) and added to
        the input of its residual block N. h, w are H, W, or those of the backbone where it is an EfficientNet."""
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
