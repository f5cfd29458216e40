"""The common parts of prior and decoder: conditioning, and the pyramid of levels down and up again."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .....schemas.stages import Block, UNetConfig
from .blocks import NORM_EPSILON, AttentionBlock, ChannelNorm, ResBlock, SizeKeepingSwitch, TimestepBlock, resize

MAX_PERIOD = 10000  # the longest period of the sinusoidal embedding, and the factor of the timestep ratio


class UNetConditions(NamedTuple):
    """The inputs of every level's blocks besides the image."""

    time: Tensor  # (B, (1 + conditions) * embedding dim)
    clip: Tensor  # (B, tokens, conditioning dim)


class UNet(nn.Module):
    """Embedding, pyramid and head of stage B and C. Subclasses add their inputs, `forward` and `predict`.

    `predict` is `forward` with the input ``time``, the embedding of the timestep, in place of its ratio. Engines that
    compute in 16 bits embed it in float32.

    Levels count from the outermost inwards, as in the config. The ``up_*`` lists count from the deepest outwards, as
    in the keys.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        width, patch_area = config.block_out_channels[0], config.patch_size**2
        self.clip_txt_pooled_mapper = nn.Linear(
            config.clip_text_pooled_in_channels, config.conditioning_dim * config.clip_seq
        )
        self.clip_norm = nn.LayerNorm(config.conditioning_dim, elementwise_affine=False, eps=NORM_EPSILON)
        self.embedding = nn.Sequential(
            nn.PixelUnshuffle(config.patch_size),
            nn.Conv2d(config.in_channels * patch_area, width, kernel_size=1),
            ChannelNorm(width),
        )
        inwards, outwards = range(config.levels), range(config.levels)[::-1]
        self.down_downscalers = nn.ModuleList(_scaler(config, level, up=False) for level in inwards)
        self.down_blocks = nn.ModuleList(
            _blocks(config, level, config.down_num_layers_per_block[level]) for level in inwards
        )
        self.down_repeat_mappers = _repeat_mappers(config.block_out_channels, config.down_blocks_repeat_mappers)
        self.up_blocks = nn.ModuleList(
            _blocks(config, level, layers, has_skip=level < config.levels - 1)
            for level, layers in zip(outwards, config.up_num_layers_per_block, strict=True)
        )
        self.up_repeat_mappers = _repeat_mappers(config.block_out_channels[::-1], config.up_blocks_repeat_mappers)
        self.up_upscalers = nn.ModuleList(_scaler(config, level, up=True) for level in outwards)
        self.clf = nn.Sequential(
            ChannelNorm(width),
            nn.Conv2d(width, config.out_channels * patch_area, kernel_size=1),
            nn.PixelShuffle(config.patch_size),
        )

    def time_embedding(self, ratio: Tensor) -> Tensor:
        """Embeddings of the ratio (B,), and of zero for every further condition, one after the other: (B, n*e)."""
        return embed_ratio(self.config, ratio)

    def pooled_tokens(self, pooled: Tensor) -> Tensor:
        """(B, 1, pooled channels) to (B, clip_seq, conditioning dim)."""
        return self.split_tokens(self.clip_txt_pooled_mapper(pooled))

    def split_tokens(self, mapped: Tensor) -> Tensor:
        """Cut every token into clip_seq tokens: (B, n, clip_seq * conditioning dim) to (B, n * clip_seq, ...)."""
        return mapped.reshape(mapped.shape[0], -1, self.config.conditioning_dim)

    def pyramid(self, x: Tensor, conditions: UNetConditions) -> Tensor:
        """The embedded sample (B, width, h, w) through all levels and the head: (B, out, h*patch, w*patch)."""
        levels = []
        for blocks, downscaler, mappers in zip(
            self.down_blocks, self.down_downscalers, self.down_repeat_mappers, strict=True
        ):
            x = _passes(blocks, mappers, downscaler(x), conditions)
            levels.append(x)
        skips = [None, *levels[-2::-1]]  # the deepest level takes its own output, and no skip
        for blocks, upscaler, mappers, skip in zip(
            self.up_blocks, self.up_upscalers, self.up_repeat_mappers, skips, strict=True
        ):
            x = upscaler(_passes(blocks, mappers, x, conditions, skip))
        y: Tensor = self.clf(x)
        return y


def embed_ratio(config: UNetConfig, ratio: Tensor) -> Tensor:
    """Embeddings of the ratio (B,), and of zero for every further condition of `config`: (B, n*e), same dtype."""
    zeros = [torch.zeros_like(ratio) for _ in config.timestep_conditioning_type]
    return torch.cat([sinusoids(value, config.timestep_ratio_embedding_dim) for value in (ratio, *zeros)], dim=1)


def sinusoids(value: Tensor, dim: int) -> Tensor:
    """Sines, then cosines of a number per sample at dim/2 frequencies: (B,) to (B, dim), same dtype.

    The product with MAX_PERIOD rounds in the dtype of `value`, as in diffusers: a ratio of 0.95 becomes 9472 in
    bfloat16. The frequencies are float32 in every dtype, float64 included: the networks were trained with these
    constants. Sine and cosine are taken in the promoted type.
    """
    steps = torch.arange(dim // 2, device=value.device).float()
    frequencies = (steps * -(math.log(MAX_PERIOD) / (dim // 2 - 1))).exp()
    angles = (value * MAX_PERIOD)[:, None] * frequencies[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(value.dtype)


def _passes(
    blocks: nn.Module, mappers: nn.Module, x: Tensor, conditions: UNetConditions, skip: Tensor | None = None
) -> Tensor:
    """Run a level once more than it has repeat mappers, with a mapper between two passes."""
    x = _run(blocks, x, conditions, skip)
    for mapper in mappers.children():
        x = _run(blocks, mapper(x), conditions, skip)
    return x


def _run(blocks: nn.Module, x: Tensor, conditions: UNetConditions, skip: Tensor | None) -> Tensor:
    for index, block in enumerate(blocks.children()):
        match block:
            case ResBlock() if index == 0 and skip is not None:
                x = block(_fitted(x, skip), skip)  # in every pass, not only in the first
            case ResBlock():
                x = block(x)
            case TimestepBlock():
                x = block(x, conditions.time)
            case AttentionBlock():
                x = block(x, conditions.clip)
    return x


def _fitted(x: Tensor, skip: Tensor) -> Tensor:
    """`x` in the size of the skip, interpolated in float32 at least. Halving an odd size has lost a row."""
    return resize(x.to(torch.promote_types(x.dtype, torch.float32)), skip).to(x.dtype)


def _blocks(config: UNetConfig, level: int, layers: int, *, has_skip: bool = False) -> nn.ModuleList:
    """The level's block kinds, `layers` times over; the very first block takes the skip."""
    kinds = config.block_types_per_layer[level] * layers
    skip_channels = config.block_out_channels[level] if has_skip else 0
    return nn.ModuleList(_block(config, level, kind, 0 if i else skip_channels) for i, kind in enumerate(kinds))


def _block(config: UNetConfig, level: int, kind: Block, skip_channels: int) -> nn.Module:
    width = config.block_out_channels[level]
    match kind:
        case Block.RES:
            return ResBlock(width, skip_channels, config.kernel_size)
        case Block.TIMESTEP:
            return TimestepBlock(width, config.timestep_ratio_embedding_dim, config.timestep_conditioning_type)
        case Block.ATTENTION:
            return AttentionBlock(width, config.conditioning_dim, config.num_attention_heads[level])


def _repeat_mappers(widths: tuple[int, ...], passes: tuple[int, ...]) -> nn.ModuleList:
    return nn.ModuleList(
        nn.ModuleList(nn.Conv2d(width, width, kernel_size=1) for _ in range(count - 1))
        for width, count in zip(widths, passes, strict=True)
    )


def _scaler(config: UNetConfig, level: int, *, up: bool) -> nn.Module:
    """The module between `level` and the next outer level: it leads inwards, or outwards with `up`."""
    if level == 0:
        return nn.Identity()
    widths = config.block_out_channels[level - 1 : level + 1]
    source, target = widths[::-1] if up else widths
    if config.switch_level is not None:
        return nn.Sequential(ChannelNorm(source), SizeKeepingSwitch(source, target, index=int(up)))
    convolution = nn.ConvTranspose2d if up else nn.Conv2d
    return nn.Sequential(ChannelNorm(source), convolution(source, target, kernel_size=2, stride=2))
