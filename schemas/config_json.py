"""Configs from and to the ``config.json`` of diffusers (prior, decoder, vqgan) and transformers (CLIP encoders).

The effnet encoder, the previewer and the ControlNets have no class in either library; their files name classes of
cascadekit."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from enum import StrEnum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import LayoutError
from .layer_tensors import EFFICIENTNET_BLOCKS, EFFICIENTNET_WIDTHS
from .messages import wrong_fields
from .stages import (
    CONTROLNETS,
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
from .tensors import Shape

MANTISSA = 2**53  # below it, every integer is a float
# Bounds far beyond every release, so that a hostile config cannot ask for endless networks.
MOST_ENTRIES = 256
MOST_BLOCKS = 1000
MOST_CHANNELS = 1_000_000
COUNTS = ("_layers", "_layers_per_block", "_repeat_mappers", "_blocks", "levels", "patch_size", "scale_factor")
MAY_BE_ZERO = ("num_attention_heads", "dropout", "proj_blocks", "bos_token_id", "eos_token_id", "pad_token_id")

DIFFUSERS_VERSION = "0.35.2"  # the last release that supports the cascade pipelines

# The sizes of the EfficientNet that Stability's encoders and ControlNets have.
BACKBONE: Mapping[str, tuple[int, ...]] = {
    "backbone_widths": EFFICIENTNET_WIDTHS,
    "backbone_blocks": EFFICIENTNET_BLOCKS,
}

_TRANSFORMERS_COMMON = {"attention_dropout": 0.0, "initializer_factor": 1.0, "initializer_range": 0.02}

# The further keys of a config.json, by class.
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

# The keys of a whole CLIP model's config that hold its towers' configs; files of 2022 have a second one for each.
_TOWERS: Mapping[Stage, str] = {Stage.TEXT_ENCODER: "text_config", Stage.IMAGE_ENCODER: "vision_config"}
_PROJECTIONS = {Stage.TEXT_ENCODER: "text_projection.weight", Stage.IMAGE_ENCODER: "visual_projection.weight"}

# The values that transformers assumes for keys that a CLIP config lacks.
_CLIP_DEFAULTS: dict[type, dict[str, Any]] = {
    TextEncoderConfig: asdict(TextEncoderConfig(512, 2048, 8, 12, 512, hidden_act="quick_gelu")),
    ImageEncoderConfig: asdict(ImageEncoderConfig(768, 3072, 12, 12, 512, patch_size=32)),
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
    """Return the content of the component's config.json; tuples become lists when it is written.

    The sizes of EfficientNetV2-S are left out, as Stability's configs have none."""
    values = asdict(config)
    if all(values.get(name) == size for name, size in BACKBONE.items()):
        values = {name: value for name, value in values.items() if name not in BACKBONE}
    return {**_EXTRAS[type(config)], **values}


def from_json(stage: Stage, values: Mapping[str, Any], shapes: Mapping[str, Shape] | None = None) -> NetworkConfig:
    """Return the config of `stage` from a parsed config.json. Keys that do not describe the network are ignored.

    From the config of a whole CLIP model one tower is taken; `shapes` are then the shapes of the tensors.

    Raises LayoutError for another class of network, missing fields, values of a wrong type or size, and settings that
    no release uses."""
    cls = _CLASSES[stage]
    if stage in _TOWERS and values.get("model_type") == "clip":
        values = _tower_values(stage, values, shapes or {})
    expected = _EXTRAS[cls].get("_class_name", _EXTRAS[cls].get("model_type"))
    found = values.get("_class_name", values.get("model_type"))
    if found != expected:
        raise LayoutError(f"config of the {stage}: expected class {expected}, found {found}")
    values = {**_CLIP_DEFAULTS.get(cls, {}), **values}
    known = {f.name: f for f in fields(cls)}
    missing = [n for n, f in known.items() if n not in values and f.default is MISSING]
    if missing:
        raise LayoutError(f"config of the {stage}: missing {', '.join(missing)}")
    config = _validated(stage, cls, {name: values[name] for name in known if name in values})
    _check_numbers(config)
    for name, size in BACKBONE.items():
        if len(getattr(config, name, size)) != len(size):
            raise LayoutError(f"config of the {stage}: {name} {values[name]}: expected {len(size)} numbers")
    if isinstance(config, UNetConfig):
        _check_unet(config, stage)
    if isinstance(config, ControlNetConfig):
        _check_controlnet(config, stage)
    return config


def _tower_values(stage: Stage, whole: Mapping[str, Any], shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Return one tower's config from that of a whole CLIP model, as CLIPConfig of transformers reads it.

    The width of the projection may be stated twice. CLIPModel uses the outer value; where both exist the tensor
    decides."""
    key, cls = _TOWERS[stage], _CLASSES[stage]
    inner, older = whole.get(key) or {}, whole.get(f"{key}_dict")
    if not isinstance(inner, Mapping) or not isinstance(older, Mapping | None):
        raise LayoutError(f"config of the {stage}: expected {key} to be an object")
    values = dict(inner) if older is None else {**inner, **_CLIP_DEFAULTS[cls], **older}
    outer, (width, *_) = whole.get("projection_dim"), shapes.get(_PROJECTIONS[stage]) or (None,)
    if outer is not None and (outer == width or "projection_dim" not in values):
        values["projection_dim"] = outer
    return {**values, "model_type": _EXTRAS[cls]["model_type"]}


def _validated(stage: Stage, cls: type[NetworkConfig], values: Mapping[str, Any]) -> NetworkConfig:
    """The config of `values`. Raises LayoutError for values of a wrong type.

    pydantic takes 0.1 s to import. It is asked only when a value is not exactly of the type that is declared."""
    hints = get_type_hints(cls)
    try:
        return cls(**{name: _exact(hints[name], value) for name, value in values.items()})
    except (TypeError, ValueError):
        pass
    from pydantic import TypeAdapter, ValidationError

    try:
        config: NetworkConfig = TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        raise LayoutError(f"config of the {stage}: {wrong_fields(error)}") from error
    return config


def _exact(hint: Any, value: Any) -> Any:
    """`value`, if it is of the type `hint`, with lists as tuples. Raises TypeError or ValueError for others."""
    kinds = get_args(hint)
    if get_origin(hint) is Literal and type(value) is str and value in kinds:
        return value
    if get_origin(hint) is tuple and isinstance(value, list | tuple) and kinds[1:] == (...,):
        return tuple(_exact(kinds[0], each) for each in value)
    if isinstance(hint, UnionType) or get_origin(hint) is Union:
        plain = next(kind for kind in kinds if kind is not NoneType)
        return None if value is None and NoneType in kinds else _exact(plain, value)
    if isinstance(hint, type) and issubclass(hint, StrEnum) and type(value) is str:
        return hint(value)
    if hint is float and type(value) is int and abs(value) < MANTISSA:
        return float(value)
    if hint in (int, float, str, bool) and type(value) is hint:
        return value
    raise TypeError(f"{value!r}: expected {hint}")


def _check_numbers(config: NetworkConfig) -> None:
    """Raise LayoutError for numbers that no network has; a config may be damaged or hostile."""
    for field in fields(config):
        value = getattr(config, field.name)
        numbers = value if isinstance(value, tuple) else (value,)
        if len(numbers) > MOST_ENTRIES:
            raise LayoutError(f"config of the {config.stage}: {field.name} has {len(numbers)} entries")
        least = 0 if field.name in MAY_BE_ZERO else 1
        most = MOST_BLOCKS if field.name.endswith(COUNTS) else MOST_CHANNELS
        for number in numbers:
            is_count = isinstance(number, int) and not isinstance(number, bool)
            if is_count and not least <= number <= most:
                raise LayoutError(
                    f"config of the {config.stage}: {field.name}: expected {least} to {most}, found {number}"
                )
            if isinstance(number, float) and not math.isfinite(number):
                raise LayoutError(f"config of the {config.stage}: {field.name}: expected a number, found {number}")


def _check_unet(config: UNetConfig, stage: Stage) -> None:
    if config.stage is not stage:
        raise LayoutError(f"config of the {stage}: it describes a {config.stage} (by its effnet_in_channels)")
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
    headless = [level for level in range(config.levels) if config.has_attention(level) and not config.heads_fit(level)]
    if headless:
        raise LayoutError(
            f"config of the {stage}: num_attention_heads do not divide the channels of level {headless[0]}"
        )


def _check_controlnet(config: ControlNetConfig, stage: Stage) -> None:
    if config.stage is not stage:
        raise LayoutError(f"config of the {stage}: it describes a {config.stage} (by its c_in and bottleneck_mode)")
    blocks = config.proj_blocks
    if not blocks or len({*blocks}) < len(blocks):
        raise LayoutError(f"config of the {stage}: proj_blocks must be the numbers of different blocks, found {blocks}")
