"""Inputs and outputs of every exported stage: name, dtype, dims and what the symbolic dims may be."""

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
    """A named tensor going in or out; dtype is numpy's name. `dims` are sizes or the names of symbolic dims; those of
    outputs may be terms in the inputs' names, such as "4*height" or, rounding down, "(height+31)//32"."""

    name: str
    dtype: str
    dims: tuple[int | str, ...]


@dataclass(frozen=True)
class Range:
    """A symbolic dim is at least `minimum` and a multiple of `step`; the graphs themselves set no upper bound."""

    minimum: int = 1
    step: int = 1


@dataclass(frozen=True)
class StagePorts:
    """The inputs and outputs of one exported graph, and the ranges of its symbolic dims."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    ranges: dict[str, Range]


def ports_of(config: NetworkConfig) -> StagePorts:
    """Ports of the stage that `config` describes; they carry the names diffusers gives its arguments.

    The vqgan's are those of its decoder half; the other half has ``vqgan_encoder_ports``."""
    match config:
        case UNetConfig() if config.stage is Stage.PRIOR:
            return _prior(config)
        case UNetConfig():
            return _decoder(config)
        case VQGANConfig():
            return _vqgan(config)
        case TextEncoderConfig():
            return _text_encoder(config)
        case ImageEncoderConfig():
            return _image_encoder(config)
        case EffnetEncoderConfig():
            return _effnet_encoder(config)
        case PreviewerConfig():
            return _previewer(config)
        case ControlNetConfig():
            return _controlnet(config)


def _prior(config: UNetConfig) -> StagePorts:
    latent = ("batch", config.in_channels, "height", "width")
    return StagePorts(
        inputs=(
            Port("sample", "float32", latent),
            Port("timestep_ratio", "float32", ("batch",)),
            Port("clip_text_pooled", "float32", ("batch", 1, config.clip_text_pooled_in_channels)),
            Port("clip_text", "float32", ("batch", "tokens", config.clip_text_in_channels or 0)),
            Port("clip_img", "float32", ("batch", "images", config.clip_image_in_channels or 0)),
        ),
        outputs=(Port("noise_pred", "float32", ("batch", config.out_channels, "height", "width")),),
        ranges={dim: Range() for dim in ("batch", "height", "width", "tokens", "images")},
    )


def _decoder(config: UNetConfig) -> StagePorts:
    # Every level but the first halves the embedded size, rounding down, and must leave at least one pixel.
    smallest = config.patch_size * 2 ** (config.levels - 1)
    side = Range(minimum=smallest, step=config.patch_size)
    return StagePorts(
        inputs=(
            Port("sample", "float32", ("batch", config.in_channels, "height", "width")),
            Port("timestep_ratio", "float32", ("batch",)),
            Port("clip_text_pooled", "float32", ("batch", 1, config.clip_text_pooled_in_channels)),
            Port("effnet", "float32", ("batch", config.effnet_in_channels or 0, "effnet_height", "effnet_width")),
        ),
        outputs=(Port("noise_pred", "float32", ("batch", config.out_channels, "height", "width")),),
        ranges={
            "batch": Range(),
            "height": side,
            "width": side,
            "effnet_height": Range(),
            "effnet_width": Range(),
        },
    )


def _vqgan(config: VQGANConfig) -> StagePorts:
    factor = config.compression
    return StagePorts(
        inputs=(Port("latents", "float32", ("batch", config.latent_channels, "height", "width")),),
        outputs=(Port("images", "float32", ("batch", config.out_channels, f"{factor}*height", f"{factor}*width")),),
        ranges={dim: Range() for dim in ("batch", "height", "width")},
    )


def vqgan_encoder_ports(config: VQGANConfig) -> StagePorts:
    """Ports of the vqgan's encoder half: images in 0..1 to unscaled latents. Both halves share their weights' file."""
    factor = config.compression
    side = Range(minimum=factor, step=factor)
    latent = ("batch", config.latent_channels, f"height//{factor}", f"width//{factor}")
    return StagePorts(
        inputs=(Port("images", "float32", ("batch", config.in_channels, "height", "width")),),
        outputs=(Port("latents", "float32", latent),),
        ranges={"batch": Range(), "height": side, "width": side},
    )


def _text_encoder(config: TextEncoderConfig) -> StagePorts:
    length = config.max_position_embeddings
    return StagePorts(
        inputs=(
            Port("input_ids", "int64", ("batch", length)),
            Port("attention_mask", "int64", ("batch", length)),
        ),
        outputs=(
            Port("prompt_embeds", "float32", ("batch", length, config.hidden_size)),
            Port("pooled", "float32", ("batch", 1, config.projection_dim)),
        ),
        ranges={"batch": Range()},
    )


def _image_encoder(config: ImageEncoderConfig) -> StagePorts:
    side = config.image_size
    return StagePorts(
        inputs=(Port("pixel_values", "float32", ("batch", config.num_channels, side, side)),),
        outputs=(Port("image_embeds", "float32", ("batch", config.projection_dim)),),
        ranges={"batch": Range()},
    )


def _effnet_encoder(config: EffnetEncoderConfig) -> StagePorts:
    return StagePorts(
        inputs=(Port("pixels", "float32", ("batch", 3, "height", "width")),),
        outputs=(Port("effnet", "float32", ("batch", config.c_latent, "(height+31)//32", "(width+31)//32")),),
        ranges={dim: Range() for dim in ("batch", "height", "width")},
    )


def _previewer(config: PreviewerConfig) -> StagePorts:
    return StagePorts(
        inputs=(Port("latents", "float32", ("batch", config.c_in, "height", "width")),),
        outputs=(Port("images", "float32", ("batch", config.c_out, "8*height", "8*width")),),
        ranges={dim: Range() for dim in ("batch", "height", "width")},
    )


def _controlnet(config: ControlNetConfig) -> StagePorts:
    # The EfficientNet's first convolution is 3 wide, strided and, with other than three channels, not padded.
    is_effnet = config.bottleneck_mode is None
    side = Range(minimum=3 if is_effnet else 1)
    size = ("(height+29)//32", "(width+29)//32") if is_effnet else ("height", "width")
    return StagePorts(
        inputs=(Port("control_image", "float32", ("batch", config.c_in, "height", "width")),),
        outputs=tuple(
            Port(control_port(block), "float32", ("batch", config.c_proj, *size)) for block in config.proj_blocks
        ),
        ranges={"batch": Range(), "height": side, "width": side},
    )


def control_port(block: int) -> str:
    """The output of a ControlNet that is added to the input of the prior's residual block `block`, counted as run."""
    return f"control.{block}"
