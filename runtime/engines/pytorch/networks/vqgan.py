"""Stage A as two networks: from latents to an image, and from an image to latents."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .....schemas.stages import VQGANConfig
from .blocks import NORM_EPSILON


class MixingBlock(nn.Module):
    """Depthwise convolution and a perceptron per pixel, both scaled, shifted and weighted by scalars.

    `gammas` (6,) holds scale, shift and weight of the convolution, then of the perceptron. (B, c, h, w) becomes
    (B, c, h, w).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gammas = nn.Parameter(torch.zeros(6))
        self.depthwise = nn.Sequential(
            nn.ReplicationPad2d(1), nn.Conv2d(channels, channels, kernel_size=3, groups=channels)
        )
        self.channelwise = nn.Sequential(
            nn.Linear(channels, channels * 4), nn.GELU(), nn.Linear(channels * 4, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        scale, shift, weight, channel_scale, channel_shift, channel_weight = self.gammas
        y = _normed(x) * (1 + scale) + shift  # (B, h, w, c)
        x = x + self.depthwise(y.permute(0, 3, 1, 2)) * weight
        y = _normed(x) * (1 + channel_scale) + channel_shift
        x = x + self.channelwise(y).permute(0, 3, 1, 2) * channel_weight
        return x


def _normed(x: Tensor) -> Tensor:
    """(B, c, h, w) to (B, h, w, c), normed over the channels."""
    return F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), eps=NORM_EPSILON)


class VQGANDecoder(nn.Module):
    """The decoder of the VQGAN; keys as in the diffusers layout, those of the encoder and codebook left out."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        widths, factor = config.widths, config.up_down_scale_factor
        layers: list[nn.Module] = [nn.Sequential(nn.Conv2d(config.latent_channels, widths[-1], kernel_size=1))]
        layers += [MixingBlock(widths[-1]) for _ in range(config.bottleneck_blocks)]
        for level in reversed(range(config.levels - 1)):
            layers += [
                nn.ConvTranspose2d(widths[level + 1], widths[level], kernel_size=4, stride=2, padding=1),
                MixingBlock(widths[level]),
            ]
        self.up_blocks = nn.Sequential(*layers)
        self.out_block = nn.Sequential(
            nn.Conv2d(widths[0], config.out_channels * factor**2, kernel_size=1), nn.PixelShuffle(factor)
        )

    def forward(self, *, latents: Tensor) -> dict[str, Tensor]:
        """``images`` (B, out, f*h, f*w) in 0..1 of stage B's ``latents`` (B, latent, h, w), in the weights' dtype.

        f is config.compression, 4 in the releases. The latents are scaled by the config's scale factor first; nothing
        is quantised.
        """
        images: Tensor = self.out_block(self.up_blocks(self.config.scale_factor * latents))
        return {"images": images.clamp(0, 1)}


class VQGANEncoder(nn.Module):
    """The encoder of the VQGAN; keys as in the diffusers layout, those of the decoder and codebook left out."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths, factor = config.widths, config.up_down_scale_factor
        self.in_block = nn.Sequential(
            nn.PixelUnshuffle(factor), nn.Conv2d(config.in_channels * factor**2, widths[0], kernel_size=1)
        )
        layers: list[nn.Module] = [MixingBlock(widths[0])]
        for outer, width in pairwise(widths):
            layers += [nn.Conv2d(outer, width, kernel_size=4, stride=2, padding=1), MixingBlock(width)]
        head = nn.Conv2d(widths[-1], config.latent_channels, kernel_size=1, bias=False)
        self.down_blocks = nn.Sequential(*layers, nn.Sequential(head, nn.BatchNorm2d(config.latent_channels)))

    def forward(self, *, images: Tensor) -> dict[str, Tensor]:
        """``latents`` (B, latent, H/f, W/f) of ``images`` (B, in, H, W) in 0..1, in the dtype of the weights.

        f is that of the decoder; H and W are multiples of it. The latents are neither scaled nor quantised: divided
        by the config's scale factor they are stage B's latents.
        """
        latents: Tensor = self.down_blocks(self.in_block(images))
        return {"latents": latents}
