"""Computes the names and shapes of a network's tensors, in the diffusers layout, from its config."""

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from .layer_tensors import Entry, Shape, affine, batch_norm, efficientnet_v2, norm
from .stages import (
    Block,
    ControlNetConfig,
    EffnetEncoderConfig,
    ImageEncoderConfig,
    NetworkConfig,
    PreviewerConfig,
    TextEncoderConfig,
    UNetConfig,
    VQGANConfig,
)

__all__ = ["LARGE_BLOCKS", "LARGE_ENTRANCE", "LARGE_WIDTH", "Shape", "expected_tensors", "is_counter"]


def expected_tensors(config: NetworkConfig) -> dict[str, Shape]:
    """Return the shape of every tensor of the network by name, buffers included."""
    return dict(_TENSORS[type(config)](config))


def is_counter(name: str) -> bool:
    """True for BatchNorm's step counter: the one integer tensor of the format, never cast."""
    return name.endswith("num_batches_tracked")


def _unet(config: UNetConfig) -> Iterator[Entry]:
    widths, cond = config.block_out_channels, config.conditioning_dim
    for name, channels in (
        ("effnet_mapper", config.effnet_in_channels),
        ("pixels_mapper", config.pixel_mapper_in_channels),
    ):
        if channels is not None:
            yield from affine(f"{name}.0", widths[0] * 4, channels, 1, 1)
            yield from affine(f"{name}.2", widths[0], widths[0] * 4, 1, 1)
    if config.clip_text_in_channels is not None:
        yield from affine("clip_txt_mapper", cond, config.clip_text_in_channels)
    yield from affine("clip_txt_pooled_mapper", cond * config.clip_seq, config.clip_text_pooled_in_channels)
    if config.clip_image_in_channels is not None:
        yield from affine("clip_img_mapper", cond * config.clip_seq, config.clip_image_in_channels)

    patch_area = config.patch_size**2
    yield from affine("embedding.1", widths[0], config.in_channels * patch_area, 1, 1)
    yield from affine("clf.1", config.out_channels * patch_area, widths[0], 1, 1)
    for level in range(config.levels):
        yield from _unet_down(config, level)
        yield from _unet_up(config, level)


def _unet_down(config: UNetConfig, level: int) -> Iterator[Entry]:
    width = config.block_out_channels[level]
    if level > 0:
        outer = config.block_out_channels[level - 1]
        if config.switch_level is None:
            yield from affine(f"down_downscalers.{level}.1", width, outer, 2, 2)
        else:
            yield from affine(f"down_downscalers.{level}.1.blocks.0", width, outer, 1, 1)
    yield from _unet_blocks(config, f"down_blocks.{level}", level, config.down_num_layers_per_block[level], skip=0)
    for i in range(config.down_blocks_repeat_mappers[level] - 1):
        yield from affine(f"down_repeat_mappers.{level}.{i}", width, width, 1, 1)


def _unet_up(config: UNetConfig, level: int) -> Iterator[Entry]:
    width = config.block_out_channels[level]
    position = config.levels - 1 - level  # the deepest level comes first on the way up
    if level > 0:
        outer = config.block_out_channels[level - 1]
        if config.switch_level is None:
            yield from affine(f"up_upscalers.{position}.1", width, outer, 2, 2, out=outer)
        else:
            yield from affine(f"up_upscalers.{position}.1.blocks.1", outer, width, 1, 1)
    skip = width if position > 0 else 0
    yield from _unet_blocks(config, f"up_blocks.{position}", level, config.up_num_layers_per_block[position], skip)
    for i in range(config.up_blocks_repeat_mappers[position] - 1):
        yield from affine(f"up_repeat_mappers.{position}.{i}", width, width, 1, 1)


def _unet_blocks(config: UNetConfig, prefix: str, level: int, layers: int, skip: int) -> Iterator[Entry]:
    kinds = config.block_types_per_layer[level]
    width = config.block_out_channels[level]
    for index in range(layers * len(kinds)):
        name = f"{prefix}.{index}"
        match kinds[index % len(kinds)]:
            case Block.RES:
                yield from affine(f"{name}.depthwise", width, 1, config.kernel_size, config.kernel_size)
                yield from affine(f"{name}.channelwise.0", 4 * width, width + (skip if index == 0 else 0))
                yield f"{name}.channelwise.2.gamma", (1, 1, 1, 4 * width)
                yield f"{name}.channelwise.2.beta", (1, 1, 1, 4 * width)
                yield from affine(f"{name}.channelwise.4", width, 4 * width)
            case Block.TIMESTEP:
                for mapper in ("mapper", *(f"mapper_{c}" for c in config.timestep_conditioning_type)):
                    yield from affine(f"{name}.{mapper}", 2 * width, config.timestep_ratio_embedding_dim)
            case Block.ATTENTION:
                for projection in ("to_q", "to_k", "to_v", "to_out.0"):
                    yield from affine(f"{name}.attention.{projection}", width, width)
                yield from affine(f"{name}.kv_mapper.1", width, config.conditioning_dim)


def _vqgan(config: VQGANConfig) -> Iterator[Entry]:
    widths, latent, patch = config.widths, config.latent_channels, config.up_down_scale_factor**2
    yield from affine("in_block.1", widths[0], config.in_channels * patch, 1, 1)
    index = 0
    for level, width in enumerate(widths):
        if level > 0:
            yield from affine(f"down_blocks.{index}", width, widths[level - 1], 4, 4)
            index += 1
        yield from _vqgan_block(f"down_blocks.{index}", width)
        index += 1
    yield f"down_blocks.{index}.0.weight", (latent, widths[-1], 1, 1)
    yield from batch_norm(f"down_blocks.{index}.1", latent)

    yield "vquantizer.embedding.weight", (config.num_vq_embeddings, latent)

    yield from affine("up_blocks.0.0", widths[-1], latent, 1, 1)
    index = 1
    for level, width in reversed(list(enumerate(widths))):
        for _ in range(config.bottleneck_blocks if level == config.levels - 1 else 1):
            yield from _vqgan_block(f"up_blocks.{index}", width)
            index += 1
        if level > 0:
            yield from affine(f"up_blocks.{index}", width, widths[level - 1], 4, 4, out=widths[level - 1])
            index += 1
    yield from affine("out_block.0", config.out_channels * patch, widths[0], 1, 1)


def _vqgan_block(name: str, width: int) -> Iterator[Entry]:
    yield f"{name}.gammas", (6,)
    yield from affine(f"{name}.depthwise.1", width, 1, 3, 3)
    yield from affine(f"{name}.channelwise.0", 4 * width, width)
    yield from affine(f"{name}.channelwise.2", width, 4 * width)


def _text_encoder(config: TextEncoderConfig) -> Iterator[Entry]:
    yield "text_model.embeddings.token_embedding.weight", (config.vocab_size, config.hidden_size)
    yield "text_model.embeddings.position_embedding.weight", (config.max_position_embeddings, config.hidden_size)
    yield from _clip_layers("text_model.encoder.layers", config)
    yield from norm("text_model.final_layer_norm", config.hidden_size)
    yield "text_projection.weight", (config.projection_dim, config.hidden_size)


def _image_encoder(config: ImageEncoderConfig) -> Iterator[Entry]:
    width, patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
    yield "vision_model.embeddings.class_embedding", (width,)
    patch_shape = (width, config.num_channels, config.patch_size, config.patch_size)
    yield "vision_model.embeddings.patch_embedding.weight", patch_shape
    yield "vision_model.embeddings.position_embedding.weight", (patches + 1, width)
    yield from norm("vision_model.pre_layrnorm", width)  # sic: the key is spelled so
    yield from _clip_layers("vision_model.encoder.layers", config)
    yield from norm("vision_model.post_layernorm", width)
    yield "visual_projection.weight", (config.projection_dim, width)


def _clip_layers(prefix: str, config: TextEncoderConfig | ImageEncoderConfig) -> Iterator[Entry]:
    width = config.hidden_size
    for layer in range(config.num_hidden_layers):
        name = f"{prefix}.{layer}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from affine(f"{name}.self_attn.{projection}", width, width)
        yield from norm(f"{name}.layer_norm1", width)
        yield from affine(f"{name}.mlp.fc1", config.intermediate_size, width)
        yield from affine(f"{name}.mlp.fc2", width, config.intermediate_size)
        yield from norm(f"{name}.layer_norm2", width)


def _effnet_encoder(config: EffnetEncoderConfig) -> Iterator[Entry]:
    yield from efficientnet_v2("backbone", 3, config.backbone_widths, config.backbone_blocks)
    yield "mapper.0.weight", (config.c_latent, config.backbone_widths[-1], 1, 1)
    yield from batch_norm("mapper.1", config.c_latent, learned=False)


def _previewer(config: PreviewerConfig) -> Iterator[Entry]:
    widths = config.widths
    layers = [(widths[0], (widths[0], config.c_in, 1, 1)), (widths[0], (widths[0], widths[0], 3, 3))]
    for wide, narrow in pairwise(widths):
        layers += [(narrow, (wide, narrow, 2, 2)), (narrow, (narrow, narrow, 3, 3))]  # transposed, then plain
    for position, (width, weight) in enumerate(layers):
        yield from affine(f"blocks.{3 * position}", *weight, out=width)  # followed by a GELU
        yield from batch_norm(f"blocks.{3 * position + 2}", width)
    yield from affine(f"blocks.{3 * len(layers)}", config.c_out, widths[-1], 1, 1)


def _controlnet(config: ControlNetConfig) -> Iterator[Entry]:
    width = config.width
    match config.bottleneck_mode:
        case None:
            yield from efficientnet_v2("backbone", config.c_in, config.backbone_widths, config.backbone_blocks)
        case "large":
            yield from _controlnet_large(config.c_in, width)
        case "simple":
            yield from affine("backbone.0", 4 * width, width, 3, 3)
            yield from affine("backbone.2", width, 4 * width, 3, 3)
    for position in range(len(config.proj_blocks)):
        yield f"projections.{position}.0.weight", (width, width, 1, 1)
        yield f"projections.{position}.2.weight", (config.c_proj, width, 1, 1)


LARGE_ENTRANCE, LARGE_WIDTH, LARGE_BLOCKS = 16384, 1024, 8  # of the "large" backbone


def _controlnet_large(channels: int, out: int) -> Iterator[Entry]:
    yield from affine("backbone.0", LARGE_ENTRANCE, channels, 1, 1)
    yield from affine("backbone.2", LARGE_WIDTH, LARGE_ENTRANCE, 1, 1)
    for index in range(3, 3 + LARGE_BLOCKS):
        for half in (0, 3):  # norm, GELU and convolution, twice
            yield from norm(f"backbone.{index}.blocks.{half}", LARGE_WIDTH)
            yield from affine(f"backbone.{index}.blocks.{half + 2}", LARGE_WIDTH, LARGE_WIDTH, 3, 3)
    yield from affine(f"backbone.{3 + LARGE_BLOCKS}", out, LARGE_WIDTH, 1, 1)


_TENSORS: Mapping[type[NetworkConfig], Callable[[Any], Iterator[Entry]]] = {
    UNetConfig: _unet,
    VQGANConfig: _vqgan,
    TextEncoderConfig: _text_encoder,
    ImageEncoderConfig: _image_encoder,
    EffnetEncoderConfig: _effnet_encoder,
    PreviewerConfig: _previewer,
    ControlNetConfig: _controlnet,
}
