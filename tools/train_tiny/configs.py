"""The networks' configs, which are the presets called "icons"."""

from cascadekit.schemas.stages import (
    PRESETS,
    EffnetEncoderConfig,
    ImageEncoderConfig,
    PreviewerConfig,
    Stage,
    TextEncoderConfig,
    UNetConfig,
    Variant,
    VQGANConfig,
)


def _preset(stage: Stage) -> object:
    return PRESETS[stage, Variant.ICONS]


VQGAN, PRIOR, DECODER, TEXT, IMAGE, EFFNET, PREVIEWER = map(
    _preset,
    (
        Stage.VQGAN,
        Stage.PRIOR,
        Stage.DECODER,
        Stage.TEXT_ENCODER,
        Stage.IMAGE_ENCODER,
        Stage.EFFNET_ENCODER,
        Stage.PREVIEWER,
    ),
)
assert isinstance(VQGAN, VQGANConfig) and isinstance(PRIOR, UNetConfig) and isinstance(DECODER, UNetConfig)
assert isinstance(TEXT, TextEncoderConfig) and isinstance(IMAGE, ImageEncoderConfig)
assert isinstance(EFFNET, EffnetEncoderConfig) and isinstance(PREVIEWER, PreviewerConfig)
