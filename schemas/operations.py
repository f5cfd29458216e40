"""Counts the arithmetic of a network: the multiply-adds of its matrix products, convolutions and attention.

Norms, activations and everything else that is done once per value are not counted; they are well below a hundredth.
"""

from collections.abc import Mapping

from .errors import ExportError
from .stages import Block, NetworkConfig, Stage, TextEncoderConfig, UNetConfig, VQGANConfig

PIXELS_AREA = 64  # of the empty image that the decoder's pixels branch maps, 8 by 8


def multiply_adds(config: NetworkConfig, sizes: Mapping[str, int]) -> int:
    """Multiply-adds of one forward pass in PyTorch; `sizes` gives the symbolic dims of the ports.

    Raises ExportError for networks that are not exported."""
    match config:
        case UNetConfig():
            return sizes["batch"] * _unet(config, sizes)
        case VQGANConfig():
            return sizes["batch"] * _vqgan(config, sizes["height"], sizes["width"])
        case TextEncoderConfig():
            return sizes["batch"] * _text_encoder(config)
    raise ExportError(f"{config.stage}: not exported, so its arithmetic is not counted")


def _unet(config: UNetConfig, sizes: Mapping[str, int]) -> int:
    """For one sample: conditioning, embedding, the levels down and up, head."""
    patch, outer = config.patch_size, config.block_out_channels[0]
    area = (sizes["height"] // patch) * (sizes["width"] // patch)
    tokens, total = _conditioning(config, sizes)
    total += area * outer * (config.in_channels + config.out_channels) * patch**2
    if config.stage is Stage.DECODER:
        mapped = area * (config.effnet_in_channels or 0) + PIXELS_AREA * (config.pixel_mapper_in_channels or 0)
        total += 4 * outer * mapped + 4 * outer**2 * (area + PIXELS_AREA)
    areas = _areas(config, sizes["height"] // patch, sizes["width"] // patch)
    for level in range(config.levels):
        position = config.levels - 1 - level
        for layers, passes, skip in (
            (config.down_num_layers_per_block[level], config.down_blocks_repeat_mappers[level], False),
            (config.up_num_layers_per_block[position], config.up_blocks_repeat_mappers[position], position > 0),
        ):
            total += _level(config, level, areas[level], tokens, layers=layers, passes=passes, skip=skip)
        if level:
            total += 2 * _switch(config, level, areas[level])
    return total


def _conditioning(config: UNetConfig, sizes: Mapping[str, int]) -> tuple[int, int]:
    """The number of conditioning tokens, and what making them takes."""
    wide = config.conditioning_dim * config.clip_seq
    tokens, total = config.clip_seq, config.clip_text_pooled_in_channels * wide
    if config.stage is Stage.PRIOR:
        tokens += sizes["tokens"] + sizes["images"] * config.clip_seq
        total += sizes["tokens"] * (config.clip_text_in_channels or 0) * config.conditioning_dim
        total += sizes["images"] * (config.clip_image_in_channels or 0) * wide
    return tokens, total


def _areas(config: UNetConfig, height: int, width: int) -> list[int]:
    """Pixels of each level."""
    halvings = [level if config.switch_level is None else 0 for level in range(config.levels)]
    return [(height >> n) * (width >> n) for n in halvings]


def _switch(config: UNetConfig, level: int, area: int) -> int:
    """Multiply-adds of the change between `level` and the next outer one: a strided 2x2 or a 1x1 convolution."""
    outer, width = config.block_out_channels[level - 1 : level + 1]
    return area * outer * width * (4 if config.switch_level is None else 1)


def _level(config: UNetConfig, level: int, area: int, tokens: int, *, layers: int, passes: int, skip: bool) -> int:
    width = config.block_out_channels[level]
    embedding = (1 + len(config.timestep_conditioning_type)) * config.timestep_ratio_embedding_dim
    costs = {
        Block.RES: area * width * (config.kernel_size**2 + 8 * width),
        Block.TIMESTEP: embedding * 2 * width,
        Block.ATTENTION: tokens * config.conditioning_dim * width
        + 2 * width**2 * (area + (area + tokens))  # to_q and to_out, to_k and to_v
        + 2 * width * area * (area + tokens),
    }
    once = layers * sum(costs[kind] for kind in config.block_types_per_layer[level])
    if skip:
        once += area * width * 4 * width  # the first block's further channels
    return passes * once + (passes - 1) * area * width**2


def _vqgan(config: VQGANConfig, height: int, width: int) -> int:
    area, channels = height * width, config.widths[-1]
    total = area * config.latent_channels * channels
    for level in reversed(range(config.levels)):
        channels = config.widths[level]
        blocks = config.bottleneck_blocks if level == config.levels - 1 else 1
        total += blocks * area * channels * (9 + 8 * channels)
        if level:
            total += area * channels * config.widths[level - 1] * 16  # 4x4, stride 2
            area *= 4
    return total + area * channels * config.out_channels * config.up_down_scale_factor**2


def _text_encoder(config: TextEncoderConfig) -> int:
    length, width = config.max_position_embeddings, config.hidden_size
    layer = length * width * (4 * width + 2 * config.intermediate_size) + 2 * length**2 * width
    return config.num_hidden_layers * layer + width * config.projection_dim
