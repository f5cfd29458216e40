"""The networks' configs, which are the presets called "icons"."""

from typing import TypeVar

from cascadekit.schemas.stages import (
    PRESETS,
    ControlNetConfig,
    EffnetEncoderConfig,
    ImageEncoderConfig,
    PreviewerConfig,
    Stage,
    TextEncoderConfig,
    UNetConfig,
    Variant,
    VQGANConfig,
)

Config = TypeVar("Config")


def _preset(stage: Stage, kind: type[Config]) -> Config:
    found = PRESETS[stage, Variant.ICONS]
    assert isinstance(found, kind)
    return found


VQGAN = _preset(Stage.VQGAN, VQGANConfig)
PRIOR = _preset(Stage.PRIOR, UNetConfig)
DECODER = _preset(Stage.DECODER, UNetConfig)
TEXT = _preset(Stage.TEXT_ENCODER, TextEncoderConfig)
IMAGE = _preset(Stage.IMAGE_ENCODER, ImageEncoderConfig)
EFFNET = _preset(Stage.EFFNET_ENCODER, EffnetEncoderConfig)
PREVIEWER = _preset(Stage.PREVIEWER, PreviewerConfig)
CANNY = _preset(Stage.CONTROLNET_CANNY, ControlNetConfig)
