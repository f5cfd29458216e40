"""The CLIP vision model with projection; attribute names are the key names of transformers."""

import torch
from torch import Tensor, nn

from .....schemas.stages import ImageEncoderConfig
from .clip import Encoder, check_activation


class ImageEmbeddings(nn.Module):
    """A learned token and one for each patch, plus positions: pixels (B, 3, s, s) to (B, 1 + patches, c)."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // patch) ** 2 + 1, width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, patches, c)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        y: Tensor = torch.cat([first, patches], dim=1) + self.position_embedding.weight
        return y


class VisionModel(nn.Module):
    """Pixels (B, 3, s, s) to the normed last row of the learned token, (B, c)."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.embeddings = ImageEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # sic: the key's spelling
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.encoder(self.pre_layrnorm(self.embeddings(pixels)), None)
        y: Tensor = self.post_layernorm(x[:, 0])
        return y


class ImageEncoder(nn.Module):
    """The image encoder; keys as in transformers. Raises LayoutError for an activation that CLIP does not use."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        check_activation(config)
        self.vision_model = VisionModel(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, *, pixel_values: Tensor) -> dict[str, Tensor]:
        """``image_embeds`` (B, projection) of ``pixel_values`` (B, 3, s, s), in the dtype of the weights.

        s is the config's image_size. The pixels are cropped, resized and normalised as by CLIP's image processor."""
        return {"image_embeds": self.visual_projection(self.vision_model(pixel_values))}
