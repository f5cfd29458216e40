"""Stage B: denoises the VQGAN's latents, given the latents of stage C."""

from torch import Tensor

from .....schemas.errors import LayoutError
from .....schemas.stages import UNetConfig
from .blocks import image_mapper, resize
from .unet import UNet, UNetConditions

PIXELS_SIZE = 8  # side of the empty image that diffusers passes to the pixels branch


class Decoder(UNet):
    """The decoder; keys as in the diffusers layout. Raises LayoutError where `config` lacks pixel channels."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        if config.effnet_in_channels is None or config.pixel_mapper_in_channels is None:
            raise LayoutError(
                f"config of the {config.stage}: effnet_in_channels or pixel_mapper_in_channels is null; set both"
            )
        self.effnet_mapper = image_mapper(config.effnet_in_channels, config.block_out_channels[0])
        self.pixel_channels = config.pixel_mapper_in_channels
        self.pixels_mapper = image_mapper(self.pixel_channels, config.block_out_channels[0])

    def forward(
        self, *, sample: Tensor, timestep_ratio: Tensor, clip_text_pooled: Tensor, effnet: Tensor
    ) -> dict[str, Tensor]:
        """The noise in the latents; all arrays are in the dtype of the weights.

        | port | shape | meaning |
        |---|---|---|
        | ``sample`` | (B, in, h, w) | noisy latents; h and w are multiples of the patch size |
        | ``timestep_ratio`` | (B,) | from 1 (noise) to 0 |
        | ``clip_text_pooled`` | (B, 1, pooled) | the prompt |
        | ``effnet`` | (B, effnet, eh, ew) | the latents of stage C |
        | ``noise_pred``, returned | (B, out, h, w) | the predicted noise |
        """
        time = self.time_embedding(timestep_ratio)
        return self.predict(sample=sample, time=time, clip_text_pooled=clip_text_pooled, effnet=effnet)

    def predict(self, *, sample: Tensor, time: Tensor, clip_text_pooled: Tensor, effnet: Tensor) -> dict[str, Tensor]:
        """`forward` with the embedded timestep, ``time`` (B, n*e)."""
        x = self.embedding(sample)  # (B, width, h / patch, w / patch)
        x = x + self.effnet_mapper(resize(effnet, x))
        x = x + self.empty_pixels(x)
        conditions = UNetConditions(time, self.clip_norm(self.pooled_tokens(clip_text_pooled)))
        return {"noise_pred": self.pyramid(x, conditions)}

    def empty_pixels(self, x: Tensor) -> Tensor:
        """The output of the pixels branch without an image. It is not zero, since the mapper has biases.

        Every pixel has the same value. It is resized nevertheless, because the resize rounds.
        """
        pixels = x.new_zeros(x.shape[0], self.pixel_channels, PIXELS_SIZE, PIXELS_SIZE)
        return resize(self.pixels_mapper(pixels), x)
