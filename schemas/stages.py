"""The stages of the cascade, one frozen config per network, and the presets of the releases.

Fields have the names of the published ``config.json`` files: of diffusers for prior, decoder and vqgan, of transformers
for the CLIP encoders. The effnet encoder, the previewer and the ControlNets have no such file; their fields are the
arguments of Stability's classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import ClassVar, Literal

from .errors import LayoutError
from .layer_tensors import EFFICIENTNET_BLOCKS, EFFICIENTNET_WIDTHS


class Stage(StrEnum):
    """One network of the cascade; the value is its folder below a model folder and a bundle."""

    TEXT_ENCODER = "text_encoder"
    IMAGE_ENCODER = "image_encoder"
    PRIOR = "prior"
    DECODER = "decoder"
    VQGAN = "vqgan"
    EFFNET_ENCODER = "effnet_encoder"
    PREVIEWER = "previewer"
    CONTROLNET_CANNY = "controlnet/canny"
    CONTROLNET_INPAINTING = "controlnet/inpainting"
    CONTROLNET_SUPER_RESOLUTION = "controlnet/super_resolution"
    CONTROLNET_IDENTITY = "controlnet/identity"


# The stages that every image goes through, in the order in which they run.
EVERY_IMAGE = (Stage.TEXT_ENCODER, Stage.PRIOR, Stage.DECODER, Stage.VQGAN)


class Variant(StrEnum):
    """The release that a config equals: Stability's full or lite, cascadekit's tiny (random) or icons (trained).

    A config that equals none of them is custom."""

    FULL = "full"
    LITE = "lite"
    TINY = "tiny"
    ICONS = "icons"
    CUSTOM = "custom"


class Block(StrEnum):
    """Block kinds of the prior and the decoder, by their diffusers class names."""

    RES = "SDCascadeResBlock"
    TIMESTEP = "SDCascadeTimestepBlock"
    ATTENTION = "SDCascadeAttnBlock"


RES_TIMESTEP = (Block.RES, Block.TIMESTEP)
RES_TIMESTEP_ATTENTION = (Block.RES, Block.TIMESTEP, Block.ATTENTION)

HEAD_CHANNELS = 64  # channels of one attention head, in every release of stage B and C


@dataclass(frozen=True)
class UNetConfig:
    """Prior (stage C) or decoder (stage B).

    Tuples have an entry for each level, the outermost first. The ``up_*`` tuples have the deepest level first, like
    ``up_blocks.N``."""

    in_channels: int
    out_channels: int
    patch_size: int
    conditioning_dim: int
    block_out_channels: tuple[int, ...]
    num_attention_heads: tuple[int, ...]  # placeholders without meaning on levels without attention
    down_num_layers_per_block: tuple[int, ...]
    up_num_layers_per_block: tuple[int, ...]
    down_blocks_repeat_mappers: tuple[int, ...]  # runs of the level, with a mapper between two runs
    up_blocks_repeat_mappers: tuple[int, ...]
    block_types_per_layer: tuple[tuple[Block, ...], ...]
    clip_text_in_channels: int | None
    clip_text_pooled_in_channels: int
    clip_image_in_channels: int | None
    effnet_in_channels: int | None
    pixel_mapper_in_channels: int | None
    dropout: tuple[float, ...]
    switch_level: tuple[bool, ...] | None  # None: strided convolutions between levels; False: 1x1, size kept
    timestep_conditioning_type: tuple[str, ...]
    clip_seq: int = 4
    kernel_size: int = 3
    self_attn: bool = True
    timestep_ratio_embedding_dim: int = 64

    @property
    def stage(self) -> Stage:
        return Stage.PRIOR if self.effnet_in_channels is None else Stage.DECODER

    @property
    def levels(self) -> int:
        return len(self.block_out_channels)

    def has_attention(self, level: int) -> bool:
        return Block.ATTENTION in self.block_types_per_layer[level]

    def heads_fit(self, level: int) -> bool:
        """True when the level's heads divide its channels."""
        heads = self.num_attention_heads[level]
        return heads > 0 and self.block_out_channels[level] % heads == 0

    def without_placeholders(self) -> "UNetConfig":
        """The same config with 0 heads on levels without attention: equal results mean equal networks."""
        heads = (n if self.has_attention(level) else 0 for level, n in enumerate(self.num_attention_heads))
        return replace(self, num_attention_heads=tuple(heads))


@dataclass(frozen=True)
class VQGANConfig:
    """Stage A."""

    stage: ClassVar[Stage] = Stage.VQGAN
    bottleneck_blocks: int
    embed_dim: int
    levels: int = 2
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    num_vq_embeddings: int = 8192
    up_down_scale_factor: int = 2
    scale_factor: float = 0.3764  # diffusers' value; Stability's code multiplies by ORIGINAL_VQGAN_SCALE

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels per level, outermost first."""
        return tuple(self.embed_dim // 2**i for i in reversed(range(self.levels)))

    @property
    def compression(self) -> int:
        """How many times smaller the latents are than the image, in each direction."""
        return int(self.up_down_scale_factor * 2 ** (self.levels - 1))


ORIGINAL_VQGAN_SCALE = 0.43


@dataclass(frozen=True)
class TextEncoderConfig:
    """CLIP text model with projection (ViT-bigG/14 in the releases)."""

    stage: ClassVar[Stage] = Stage.TEXT_ENCODER
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_hidden_layers: int
    projection_dim: int
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    max_position_embeddings: int = 77
    vocab_size: int = 49408
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 1


@dataclass(frozen=True)
class ImageEncoderConfig:
    """CLIP vision model with projection (ViT-L/14 in the releases)."""

    stage: ClassVar[Stage] = Stage.IMAGE_ENCODER
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_hidden_layers: int
    projection_dim: int
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    image_size: int = 224
    patch_size: int = 14
    num_channels: int = 3


@dataclass(frozen=True)
class EffnetEncoderConfig:
    """Encodes an image into latents of the prior, 32 times smaller: EfficientNetV2-S and a 1x1 convolution.

    A narrower backbone has other widths (stem, six rows, last convolution) and blocks (of each row)."""

    stage: ClassVar[Stage] = Stage.EFFNET_ENCODER
    c_latent: int = 16
    backbone_widths: tuple[int, ...] = EFFICIENTNET_WIDTHS
    backbone_blocks: tuple[int, ...] = EFFICIENTNET_BLOCKS


@dataclass(frozen=True)
class PreviewerConfig:
    """Decodes the prior's latents into a small image, 8 times their size."""

    stage: ClassVar[Stage] = Stage.PREVIEWER
    c_in: int = 16
    c_hidden: int = 512
    c_out: int = 3

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at the size of the latents, and after each doubling of the size."""
        return tuple(self.c_hidden // share for share in (1, 2, 4, 4))


Bottleneck = Literal["large", "simple"]

# The released kinds differ in the channels of the control image and in the backbone (None: EfficientNetV2-S).
CONTROLNET_KINDS: Mapping[Stage, tuple[int, Bottleneck | None]] = {
    Stage.CONTROLNET_CANNY: (1, None),
    Stage.CONTROLNET_INPAINTING: (4, None),
    Stage.CONTROLNET_SUPER_RESOLUTION: (16, "large"),
    Stage.CONTROLNET_IDENTITY: (512, "simple"),
}
CONTROLNETS = tuple(CONTROLNET_KINDS)


@dataclass(frozen=True)
class ControlNetConfig:
    """A ControlNet computes residuals from a control image, for the inputs of some residual blocks of the full prior.

    Raises LayoutError for channels and a backbone that no released kind has."""

    c_in: int
    proj_blocks: tuple[int, ...]  # the residual blocks, counted in the order they run; one projection for each
    bottleneck_mode: Bottleneck | None = None
    c_proj: int = 2048  # channels of the prior
    backbone_widths: tuple[int, ...] = EFFICIENTNET_WIDTHS  # of an EfficientNet, as in EffnetEncoderConfig
    backbone_blocks: tuple[int, ...] = EFFICIENTNET_BLOCKS

    def __post_init__(self) -> None:
        if (self.c_in, self.bottleneck_mode) not in CONTROLNET_KINDS.values():
            raise LayoutError(
                f"a ControlNet of {self.c_in} input channels with bottleneck_mode {self.bottleneck_mode} is none of "
                f"the released ones ({', '.join(CONTROLNETS)})"
            )

    @property
    def stage(self) -> Stage:
        kind = (self.c_in, self.bottleneck_mode)
        return next(stage for stage, released in CONTROLNET_KINDS.items() if released == kind)

    @property
    def width(self) -> int:
        """Channels that leave the backbone."""
        return self.c_in if self.bottleneck_mode == "simple" else self.backbone_widths[-1]


NetworkConfig = (
    UNetConfig
    | VQGANConfig
    | TextEncoderConfig
    | ImageEncoderConfig
    | EffnetEncoderConfig
    | PreviewerConfig
    | ControlNetConfig
)


def prior_config(
    widths: tuple[int, ...],
    heads: tuple[int, ...],
    layers: tuple[int, ...],
    *,
    text: int = 1280,
    pooled: int = 1280,
    image: int = 768,
) -> UNetConfig:
    """A stage C like the released ones: two levels of equal size with attention; `layers` on the way down."""
    return UNetConfig(
        in_channels=16,
        out_channels=16,
        patch_size=1,
        conditioning_dim=widths[0],
        block_out_channels=widths,
        num_attention_heads=heads,
        down_num_layers_per_block=layers,
        up_num_layers_per_block=layers[::-1],
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(RES_TIMESTEP_ATTENTION, RES_TIMESTEP_ATTENTION),
        clip_text_in_channels=text,
        clip_text_pooled_in_channels=pooled,
        clip_image_in_channels=image,
        effnet_in_channels=None,
        pixel_mapper_in_channels=None,
        dropout=(0.1, 0.1),
        switch_level=(False,),
        timestep_conditioning_type=("sca", "crp"),
    )


def decoder_config(
    widths: tuple[int, ...],
    heads: tuple[int, ...],
    layers: tuple[int, ...],
    up_repeats: tuple[int, ...],
    *,
    conditioning: int = 1280,
    pooled: int = 1280,
) -> UNetConfig:
    """A stage B like the released ones: four levels, attention on the inner two."""
    return UNetConfig(
        in_channels=4,
        out_channels=4,
        patch_size=2,
        conditioning_dim=conditioning,
        block_out_channels=widths,
        num_attention_heads=heads,
        down_num_layers_per_block=layers,
        up_num_layers_per_block=layers[::-1],
        down_blocks_repeat_mappers=(1, 1, 1, 1),
        up_blocks_repeat_mappers=up_repeats,
        block_types_per_layer=(RES_TIMESTEP, RES_TIMESTEP, RES_TIMESTEP_ATTENTION, RES_TIMESTEP_ATTENTION),
        clip_text_in_channels=None,
        clip_text_pooled_in_channels=pooled,
        clip_image_in_channels=None,
        effnet_in_channels=16,
        pixel_mapper_in_channels=3,
        dropout=(0, 0, 0.1, 0.1),
        switch_level=None,
        timestep_conditioning_type=("sca",),
    )


# The blocks of the full prior that the released ControlNets feed: eight at its ends, or every one.
PROJ_BLOCKS_ENDS = (0, 4, 8, 12, 51, 55, 59, 63)
PROJ_BLOCKS_ALL = tuple(range(64))
PROJ_BLOCKS_ICONS = (0, 2, 5)  # of the six blocks of the small prior for icons

PRESETS: dict[tuple[Stage, Variant], NetworkConfig] = {
    (Stage.PRIOR, Variant.FULL): prior_config((2048, 2048), (32, 32), (8, 24)),
    (Stage.PRIOR, Variant.LITE): prior_config((1536, 1536), (24, 24), (4, 12)),
    (Stage.PRIOR, Variant.ICONS): prior_config((128, 128), (2, 2), (1, 2), text=48, pooled=64, image=64),
    (Stage.PRIOR, Variant.TINY): prior_config((64, 64), (1, 1), (1, 1), text=8, pooled=12),
    (Stage.DECODER, Variant.FULL): decoder_config((320, 640, 1280, 1280), (0, 0, 20, 20), (2, 6, 28, 6), (3, 3, 2, 2)),
    (Stage.DECODER, Variant.LITE): decoder_config((320, 576, 1152, 1152), (0, 9, 18, 18), (2, 4, 14, 4), (2, 2, 2, 2)),
    (Stage.DECODER, Variant.ICONS): decoder_config(
        (96, 128, 128, 64), (0, 0, 2, 1), (1, 1, 1, 1), (2, 2, 1, 1), conditioning=128, pooled=64
    ),
    (Stage.DECODER, Variant.TINY): decoder_config(
        (16, 32, 64, 64), (0, 0, 1, 1), (1, 1, 1, 1), (3, 2, 2, 2), conditioning=48, pooled=12
    ),
    (Stage.VQGAN, Variant.ICONS): VQGANConfig(bottleneck_blocks=3, embed_dim=48, num_vq_embeddings=512),
    (Stage.VQGAN, Variant.FULL): VQGANConfig(bottleneck_blocks=12, embed_dim=384),
    (Stage.VQGAN, Variant.TINY): VQGANConfig(bottleneck_blocks=2, embed_dim=32, num_vq_embeddings=64),
    (Stage.TEXT_ENCODER, Variant.ICONS): TextEncoderConfig(48, 192, 4, 3, 64),
    (Stage.TEXT_ENCODER, Variant.FULL): TextEncoderConfig(1280, 5120, 20, 32, 1280),
    (Stage.TEXT_ENCODER, Variant.TINY): TextEncoderConfig(8, 32, 2, 2, 12),
    (Stage.IMAGE_ENCODER, Variant.ICONS): ImageEncoderConfig(64, 256, 4, 3, 64, patch_size=32),
    (Stage.IMAGE_ENCODER, Variant.FULL): ImageEncoderConfig(1024, 4096, 16, 24, 768),
    (Stage.EFFNET_ENCODER, Variant.FULL): EffnetEncoderConfig(),
    (Stage.EFFNET_ENCODER, Variant.ICONS): EffnetEncoderConfig(
        backbone_widths=(8, 8, 16, 32, 64, 64, 128, 256), backbone_blocks=(1, 1, 1, 2, 2, 1)
    ),
    (Stage.PREVIEWER, Variant.FULL): PreviewerConfig(),
    (Stage.PREVIEWER, Variant.ICONS): PreviewerConfig(c_hidden=32),
    (Stage.CONTROLNET_CANNY, Variant.FULL): ControlNetConfig(1, PROJ_BLOCKS_ENDS),
    (Stage.CONTROLNET_CANNY, Variant.ICONS): ControlNetConfig(
        1,
        PROJ_BLOCKS_ICONS,
        c_proj=128,
        backbone_widths=(8, 8, 8, 16, 24, 24, 32, 32),
        backbone_blocks=(1, 1, 1, 1, 1, 1),
    ),
    (Stage.CONTROLNET_INPAINTING, Variant.FULL): ControlNetConfig(4, PROJ_BLOCKS_ENDS),
    (Stage.CONTROLNET_SUPER_RESOLUTION, Variant.FULL): ControlNetConfig(16, PROJ_BLOCKS_ENDS, "large"),
    (Stage.CONTROLNET_IDENTITY, Variant.FULL): ControlNetConfig(512, PROJ_BLOCKS_ALL, "simple"),
}


def variant_of(config: NetworkConfig) -> Variant:
    """Return the release whose network `config` describes, or CUSTOM."""
    for (_, variant), preset in PRESETS.items():
        if same_network(config, preset):
            return variant
    return Variant.CUSTOM


def same_network(a: NetworkConfig, b: NetworkConfig) -> bool:
    """True for configs of equal networks. Head placeholders and the VQGAN's scale do not matter."""
    if isinstance(a, UNetConfig) and isinstance(b, UNetConfig):
        return a.without_placeholders() == b.without_placeholders()
    if isinstance(a, VQGANConfig) and isinstance(b, VQGANConfig):
        return replace(a, scale_factor=0) == replace(b, scale_factor=0)
    return a == b
