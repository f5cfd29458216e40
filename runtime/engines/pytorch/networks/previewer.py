"""The previewer: from the prior's latents to a small image, without stages B and A."""

from itertools import pairwise

from torch import Tensor, nn

from .....schemas.stages import PreviewerConfig


class Previewer(nn.Module):
    """Convolutions, each followed by a GELU and a BatchNorm, that double the size three times.

    Keys are those of Stability's file."""

    def __init__(self, config: PreviewerConfig) -> None:
        super().__init__()
        widths = config.widths
        layers = [*_layer(nn.Conv2d(config.c_in, widths[0], kernel_size=1)), *_smoothing(widths[0])]
        for wide, narrow in pairwise(widths):
            layers += _layer(nn.ConvTranspose2d(wide, narrow, kernel_size=2, stride=2))
            layers += _smoothing(narrow)
        self.blocks = nn.Sequential(*layers, nn.Conv2d(widths[-1], config.c_out, kernel_size=1))

    def forward(self, *, latents: Tensor) -> dict[str, Tensor]:
        """``images`` (B, out, 8h, 8w) of the prior's ``latents`` (B, in, h, w), in the dtype of the weights.

        The images are clamped to 0..1, the range that the network was trained for."""
        images: Tensor = self.blocks(latents)
        return {"images": images.clamp(0, 1)}


def _smoothing(width: int) -> list[nn.Module]:
    return _layer(nn.Conv2d(width, width, kernel_size=3, padding=1))


def _layer(convolution: nn.Conv2d | nn.ConvTranspose2d) -> list[nn.Module]:
    return [convolution, nn.GELU(), nn.BatchNorm2d(convolution.out_channels)]
