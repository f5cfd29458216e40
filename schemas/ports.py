"""Inputs and outputs of every exported stage: names, dtypes, dims, and the ranges of the symbolic dims."""

from collections.abc import Mapping
from dataclasses import dataclass

from .stages import (
    ControlNetConfig,
    EffnetEncoderConfig,
    ImageEncoderConfig,
    NetworkConfig,
    PreviewerConfig,
    Stage,
    TextEncoderConfig,
    UNetConfig,
    VQGANConfig,
)


@dataclass(frozen=True)
class Port:
    """A named input or output; `dtype` is numpy's name.

    `dims` are sizes or names of symbolic dims. Dims of outputs may be terms in the inputs' names, such as "4*height"
    or, rounded down, "(height+31)//32"."""

    name: str
    dtype: str
    dims: tuple[int | str, ...]


@dataclass(frozen=True)
class SizeRange:
    """The sizes of a symbolic dim: multiples of `step` from `minimum` on. The graphs set no upper bound."""

    minimum: int = 1
    step: int = 1


@dataclass(frozen=True)
class StagePorts:
    """The inputs and outputs of one exported graph, and the ranges of its symbolic dims."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    ranges: dict[str, SizeRange]


def stage_ports(
    inputs: tuple[Port, ...], outputs: tuple[Port, ...], ranges: Mapping[str, SizeRange] | None = None
) -> StagePorts:
    """The ports of a graph whose symbolic input dims may have any size, but for those in `ranges`."""
    names = dict.fromkeys(dim for port in inputs for dim in port.dims if isinstance(dim, str) and dim.isidentifier())
    return StagePorts(inputs, outputs, {name: (ranges or {}).get(name, SizeRange()) for name in names})


def ports_of(config: NetworkConfig) -> StagePorts:
    """Ports of the stage that `config` describes, with the names of diffusers' arguments.

    The vqgan's ports belong to its decoder half; ``vqgan_encoder_ports`` has those of the other half."""
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    match config:
        case UNetConfig():
            return _prior(config) if config.stage is Stage.PRIOR else _decoder(config)
        case VQGANConfig():
            inputs = (_floats("latents", config.latent_channels, "height", "width"),)
            factor = config.compression
            outputs = (_floats("images", config.out_channels, f"{factor}*height", f"{factor}*width"),)
        case TextEncoderConfig():
            length = config.max_position_embeddings
            inputs = tuple(Port(name, "int64", ("batch", length)) for name in ("input_ids", "attention_mask"))
            outputs = (
                _floats("prompt_embeds", length, config.hidden_size),
                _floats("pooled", 1, config.projection_dim),
            )
        case ImageEncoderConfig():
            inputs = (_floats("pixel_values", config.num_channels, config.image_size, config.image_size),)
            outputs = (_floats("image_embeds", config.projection_dim),)
        case EffnetEncoderConfig():
            inputs = (_floats("pixels", 3, "height", "width"),)
            outputs = (_floats("effnet", config.c_latent, "(height+31)//32", "(width+31)//32"),)
        case PreviewerConfig():
            inputs = (_floats("latents", config.c_in, "height", "width"),)
            outputs = (_floats("images", config.c_out, "8*height", "8*width"),)
        case ControlNetConfig():
            return _controlnet(config)
    return stage_ports(inputs, outputs)


def _floats(name: str, *dims: int | str) -> Port:
    """A float32 port whose first dim is the batch."""
    return Port(name, "float32", ("batch", *dims))


def _prior(config: UNetConfig) -> StagePorts:
    return stage_ports(
        (
            _floats("sample", config.in_channels, "height", "width"),
            _floats("timestep_ratio"),
            _floats("clip_text_pooled", 1, config.clip_text_pooled_in_channels),
            _floats("clip_text", "tokens", config.clip_text_in_channels or 0),
            _floats("clip_img", "images", config.clip_image_in_channels or 0),
        ),
        (_floats("noise_pred", config.out_channels, "height", "width"),),
    )


def _decoder(config: UNetConfig) -> StagePorts:
    # Every level but the first halves the embedded size, rounding down, and must leave at least one pixel.
    side = SizeRange(minimum=config.patch_size * 2 ** (config.levels - 1), step=config.patch_size)
    return stage_ports(
        (
            _floats("sample", config.in_channels, "height", "width"),
            _floats("timestep_ratio"),
            _floats("clip_text_pooled", 1, config.clip_text_pooled_in_channels),
            _floats("effnet", config.effnet_in_channels or 0, "effnet_height", "effnet_width"),
        ),
        (_floats("noise_pred", config.out_channels, "height", "width"),),
        {"height": side, "width": side},
    )


def vqgan_encoder_ports(config: VQGANConfig) -> StagePorts:
    """Ports of the vqgan's encoder half: images in 0..1 to unscaled latents. Both halves share their weights' file."""
    factor = config.compression
    side = SizeRange(minimum=factor, step=factor)
    return stage_ports(
        (_floats("images", config.in_channels, "height", "width"),),
        (_floats("latents", config.latent_channels, f"height//{factor}", f"width//{factor}"),),
        {"height": side, "width": side},
    )


def _controlnet(config: ControlNetConfig) -> StagePorts:
    # The EfficientNet's first convolution is 3 wide, strided and, with other than three channels, not padded.
    is_effnet = config.bottleneck_mode is None
    side = SizeRange(minimum=3 if is_effnet else 1)
    size = ("(height+29)//32", "(width+29)//32") if is_effnet else ("height", "width")
    return stage_ports(
        (_floats("control_image", config.c_in, "height", "width"),),
        tuple(_floats(control_port(block), config.c_proj, *size) for block in config.proj_blocks),
        {"height": side, "width": side},
    )


def control_port(block: int) -> str:
    """The output of a ControlNet that is added to the input of the prior's residual block `block`, counted as run."""
    return f"control.{block}"
