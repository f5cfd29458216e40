"""Configs from and to the ``config.json`` of diffusers (prior, decoder, vqgan) and transformers (CLIP encoders).

The effnet encoder, the previewer and the ControlNets have no class in either library: theirs is our own."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, replace
from typing import Any

from .errors import LayoutError
from .stages import (
    CONTROLNETS,
    Block,
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

DIFFUSERS_VERSION = "0.35.2"  # the last release that supports the cascade pipelines

_TRANSFORMERS_COMMON = {"attention_dropout": 0.0, "initializer_factor": 1.0, "initializer_range": 0.02}

# What a config.json says besides the config's own fields, per class.
_EXTRAS: dict[type, dict[str, Any]] = {
    UNetConfig: {"_class_name": "StableCascadeUNet", "_diffusers_version": DIFFUSERS_VERSION},
    VQGANConfig: {"_class_name": "PaellaVQModel", "_diffusers_version": DIFFUSERS_VERSION},
    TextEncoderConfig: {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        **_TRANSFORMERS_COMMON,
    },
    ImageEncoderConfig: {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        **_TRANSFORMERS_COMMON,
    },
    EffnetEncoderConfig: {"_class_name": "CascadeEffnetEncoder"},
    PreviewerConfig: {"_class_name": "CascadePreviewer"},
    ControlNetConfig: {"_class_name": "CascadeControlNet"},
}

_CLASSES: dict[Stage, type[NetworkConfig]] = {
    Stage.PRIOR: UNetConfig,
    Stage.DECODER: UNetConfig,
    Stage.VQGAN: VQGANConfig,
    Stage.TEXT_ENCODER: TextEncoderConfig,
    Stage.IMAGE_ENCODER: ImageEncoderConfig,
    Stage.EFFNET_ENCODER: EffnetEncoderConfig,
    Stage.PREVIEWER: PreviewerConfig,
    **dict.fromkeys(CONTROLNETS, ControlNetConfig),
}


def to_json(config: NetworkConfig) -> dict[str, Any]:
    """The content of the component's config.json; tuples become lists when dumped."""
    return {**_EXTRAS[type(config)], **asdict(config)}


def from_json(stage: Stage, values: Mapping[str, Any]) -> NetworkConfig:
    """The config of `stage` from a parsed config.json. Fields that do not shape the network are ignored.

    Raises LayoutError for another class of network, missing fields, and settings no release uses.
    """
    cls = _CLASSES[stage]
    expected = _EXTRAS[cls].get("_class_name", _EXTRAS[cls].get("model_type"))
    found = values.get("_class_name", values.get("model_type"))
    if found != expected:
        raise LayoutError(f"config of the {stage}: expected class {expected}, found {found}")
    known = {f.name: f for f in fields(cls)}
    missing = [n for n, f in known.items() if n not in values and f.default is MISSING]
    if missing:
        raise LayoutError(f"config of the {stage}: missing {', '.join(missing)}")
    try:
        config = cls(**{name: _frozen(values[name]) for name in known if name in values})
        match config:
            case UNetConfig():
                return _checked_unet(config, stage)
            case ControlNetConfig():
                return _checked_controlnet(config, stage)
    except (TypeError, ValueError) as error:
        raise LayoutError(f"config of the {stage}: {error}") from error
    return config


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value


def _checked_unet(config: UNetConfig, stage: Stage) -> UNetConfig:
    if config.stage is not stage:
        raise LayoutError(f"config of the {stage}: it describes a {config.stage} (effnet_in_channels tells)")
    if config.switch_level is not None and any(config.switch_level):
        raise LayoutError(f"config of the {stage}: switch_level true is used by no release and not supported")
    if not config.self_attn:
        raise LayoutError(f"config of the {stage}: self_attn false is used by no release and not supported")
    per_level = {
        f.name: getattr(config, f.name)
        for f in fields(config)
        if f.name.startswith(("block_", "num_attention", "down_", "up_"))
    }
    wrong = [name for name, value in per_level.items() if len(value) != config.levels]
    if wrong:
        raise LayoutError(f"config of the {stage}: {', '.join(wrong)} must have {config.levels} entries, one per level")
    kinds = tuple(tuple(Block(kind) for kind in level) for level in config.block_types_per_layer)
    return replace(config, block_types_per_layer=kinds)


def _checked_controlnet(config: ControlNetConfig, stage: Stage) -> ControlNetConfig:
    if config.stage is not stage:
        raise LayoutError(f"config of the {stage}: it describes a {config.stage} (c_in and bottleneck_mode tell)")
    blocks = config.proj_blocks
    if not blocks or any(not isinstance(block, int) or block < 0 for block in blocks) or len({*blocks}) < len(blocks):
        raise LayoutError(f"config of the {stage}: proj_blocks must be the numbers of different blocks, found {blocks}")
    return config
