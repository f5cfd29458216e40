"""The semantic compressor: from an image to latents of the prior."""

from torch import Tensor, nn

from .....schemas.stages import EffnetEncoderConfig
from .efficientnet import efficientnet_v2


class EffnetEncoder(nn.Module):
    """EfficientNetV2-S and a projection whitened by a BatchNorm; keys as in Stability's file."""

    def __init__(self, config: EffnetEncoderConfig) -> None:
        super().__init__()
        self.backbone = efficientnet_v2(3, config.backbone_widths, config.backbone_blocks)
        self.mapper = nn.Sequential(
            nn.Conv2d(config.backbone_widths[-1], config.c_latent, kernel_size=1, bias=False),
            nn.BatchNorm2d(config.c_latent, affine=False),
        )

    def forward(self, *, pixels: Tensor) -> dict[str, Tensor]:
        """``effnet`` (B, latent, H/32, W/32), rounded up, of ``pixels`` (B, 3, H, W), in the dtype of the weights.

        The pixels are images in 0..1 that ``runtime.images.pictures.effnet_pixels`` has normalised."""
        return {"effnet": self.mapper(self.backbone(pixels))}
