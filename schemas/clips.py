"""The CLIP models whose towers the cascade was trained with, and whether another tower fits its networks."""

from collections.abc import Iterable, Mapping

from .stages import ImageEncoderConfig, NetworkConfig, Stage, TextEncoderConfig, UNetConfig

# The models that the towers of the Stable Cascade releases were taken from.
SOURCE_MODELS: Mapping[Stage, str] = {
    Stage.TEXT_ENCODER: "CLIP ViT-bigG/14 (laion/CLIP-ViT-bigG-14-laion2B-39B-b160k)",
    Stage.IMAGE_ENCODER: "CLIP ViT-L/14 (openai/clip-vit-large-patch14)",
}

# Hidden width of a tower -> the CLIP model that has it.
_WIDTHS: Mapping[Stage, Mapping[int, str]] = {
    Stage.TEXT_ENCODER: {512: "ViT-B", 768: "ViT-L/14", 1024: "ViT-H/14", 1280: "ViT-bigG/14"},
    Stage.IMAGE_ENCODER: {768: "ViT-B", 1024: "ViT-L/14", 1280: "ViT-H/14", 1664: "ViT-bigG/14"},
}
_TOWERS = {Stage.TEXT_ENCODER: "text", Stage.IMAGE_ENCODER: "image"}


def tower_name(stage: Stage, width: int) -> str:
    """Describe the CLIP model that a tower of this width most likely belongs to.

    For example: "the text tower of CLIP ViT-L/14, 768 wide"."""
    model = _WIDTHS[stage].get(width)
    return f"the {_TOWERS[stage]} tower of {f'CLIP {model}' if model else 'a CLIP model'}, {width} wide"


def misfit(encoder: NetworkConfig, networks: Iterable[NetworkConfig]) -> str | None:
    """Return why `encoder` cannot feed the prior or the decoder among `networks`.

    None when it can, and for networks that are not CLIP towers."""
    for unet in networks:
        if not isinstance(unet, UNetConfig):
            continue
        wrong = [f"{what} {want}, found {found}" for what, want, found in _widths(encoder, unet) if want != found]
        if wrong and isinstance(encoder, TextEncoderConfig | ImageEncoderConfig):
            return (
                f"{tower_name(encoder.stage, encoder.hidden_size)}, does not fit the {unet.stage}: "
                f"expected {' and '.join(wrong)}; the releases use {SOURCE_MODELS[encoder.stage]}"
            )
    return None


def _widths(encoder: NetworkConfig, unet: UNetConfig) -> Iterable[tuple[str, int, int]]:
    """Yield each width of the encoder's outputs: its description, the width the UNet needs, and the width found."""
    match encoder:
        case TextEncoderConfig():
            if unet.clip_text_in_channels is not None:
                yield "a hidden width of", unet.clip_text_in_channels, encoder.hidden_size
            yield "a projection to", unet.clip_text_pooled_in_channels, encoder.projection_dim
        case ImageEncoderConfig():
            if unet.clip_image_in_channels is not None:
                yield "a projection to", unet.clip_image_in_channels, encoder.projection_dim
