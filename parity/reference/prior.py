"""Stage C: denoises the semantic latents, given text and images."""

import torch
from torch import Tensor, nn

from ...schemas.errors import LayoutError
from ...schemas.stages import UNetConfig
from .unet import UNet, UNetConditions


class Prior(UNet):
    """The prior; keys as in the diffusers layout. Raises LayoutError where `config` lacks text or image channels."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        if config.clip_text_in_channels is None or config.clip_image_in_channels is None:
            raise LayoutError(f"config of the {config.stage}: clip_text_in_channels or clip_image_in_channels is null")
        self.clip_txt_mapper = nn.Linear(config.clip_text_in_channels, config.conditioning_dim)
        self.clip_img_mapper = nn.Linear(config.clip_image_in_channels, config.conditioning_dim * config.clip_seq)

    def forward(
        self, *, sample: Tensor, timestep_ratio: Tensor, clip_text_pooled: Tensor, clip_text: Tensor, clip_img: Tensor
    ) -> dict[str, Tensor]:
        """The noise in the latents.

        ``sample`` (B, in, h, w), ``timestep_ratio`` (B,) from 1 (noise) to 0, ``clip_text_pooled`` (B, 1, pooled),
        ``clip_text`` (B, tokens, text) and ``clip_img`` (B, images, image), all in the dtype of the weights, to
        ``noise_pred`` (B, out, h, w). Without an image prompt ``clip_img`` is zeros of one image.
        """
        tokens = [
            self.clip_txt_mapper(clip_text),  # (B, tokens, cond)
            self.pooled_tokens(clip_text_pooled),  # (B, clip_seq, cond)
            self.split_tokens(self.clip_img_mapper(clip_img)),  # (B, images * clip_seq, cond)
        ]
        clip = self.clip_norm(torch.cat(tokens, dim=1))
        conditions = UNetConditions(self.time_embedding(timestep_ratio), clip)
        return {"noise_pred": self.pyramid(self.embedding(sample), conditions)}
