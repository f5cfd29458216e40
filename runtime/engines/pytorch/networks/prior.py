"""Stage C: denoises the semantic latents, given text and images."""

import torch
from torch import Tensor, nn

from .....schemas.errors import LayoutError
from .....schemas.stages import UNetConfig
from .unet import UNet, UNetConditions


class Prior(UNet):
    """The prior; keys as in the diffusers layout. Raises LayoutError where `config` lacks text or image channels."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        if config.clip_text_in_channels is None or config.clip_image_in_channels is None:
            raise LayoutError(
                f"config of the {config.stage}: clip_text_in_channels or clip_image_in_channels is null; set both"
            )
        self.clip_txt_mapper = nn.Linear(config.clip_text_in_channels, config.conditioning_dim)
        self.clip_img_mapper = nn.Linear(config.clip_image_in_channels, config.conditioning_dim * config.clip_seq)

    def forward(
        self, *, sample: Tensor, timestep_ratio: Tensor, clip_text_pooled: Tensor, clip_text: Tensor, clip_img: Tensor
    ) -> dict[str, Tensor]:
        """The noise in the latents; all arrays are in the dtype of the weights.

        | port | shape | meaning |
        |---|---|---|
        | ``sample`` | (B, in, h, w) | noisy latents |
        | ``timestep_ratio`` | (B,) | from 1 (noise) to 0 |
        | ``clip_text_pooled`` | (B, 1, pooled) | the prompt |
        | ``clip_text`` | (B, tokens, text) | the prompt's tokens |
        | ``clip_img`` | (B, images, image) | image prompts; zeros of one image without any |
        | ``noise_pred``, returned | (B, out, h, w) | the predicted noise |
        """
        return self.predict(
            sample=sample,
            time=self.time_embedding(timestep_ratio),
            clip_text_pooled=clip_text_pooled,
            clip_text=clip_text,
            clip_img=clip_img,
        )

    def predict(
        self, *, sample: Tensor, time: Tensor, clip_text_pooled: Tensor, clip_text: Tensor, clip_img: Tensor
    ) -> dict[str, Tensor]:
        """`forward` with the embedded timestep, ``time`` (B, n*e)."""
        tokens = [
            self.clip_txt_mapper(clip_text),  # (B, tokens, cond)
            self.pooled_tokens(clip_text_pooled),  # (B, clip_seq, cond)
            self.split_tokens(self.clip_img_mapper(clip_img)),  # (B, images * clip_seq, cond)
        ]
        clip = self.clip_norm(torch.cat(tokens, dim=1))
        return {"noise_pred": self.pyramid(self.embedding(sample), UNetConditions(time, clip))}
