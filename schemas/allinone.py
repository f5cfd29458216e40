"""Files that hold several components, each behind a prefix: ComfyUI's all-in-one files, and training states."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .layouts import Layout
from .stages import Stage


@dataclass(frozen=True)
class Part:
    """What stands behind a prefix: `stage` in the names of `layout`, or where these are None whatever it is."""

    prefix: str
    stage: Stage | None = None
    layout: Layout | None = None
    rank: int = 0  # of two parts holding one stage the lower rank is taken, unless the other is asked for


COMFYUI_PREFIXES: Mapping[Stage, str] = {
    Stage.PRIOR: "model.diffusion_model.",
    Stage.DECODER: "model.diffusion_model.",
    Stage.TEXT_ENCODER: "text_encoder.clip_g.",
    Stage.IMAGE_ENCODER: "clip_l_vision.",
    Stage.EFFNET_ENCODER: "vae.encoder.",
    Stage.PREVIEWER: "vae.previewer.",
    Stage.VQGAN: "vae.",
}

# The longer prefix comes first where one begins with another.
PARTS: tuple[Part, ...] = (
    Part("model.diffusion_model."),  # prior or decoder, its attention joined or split
    *(
        Part(COMFYUI_PREFIXES[stage], stage, Layout.COMFYUI)
        for stage in (
            Stage.TEXT_ENCODER,
            Stage.IMAGE_ENCODER,
            Stage.EFFNET_ENCODER,
            Stage.PREVIEWER,
            Stage.VQGAN,
        )
    ),
    Part("generator_ema.", rank=1),
    Part("generator."),
    Part("state_dict."),
)
WHOLE = Part("")

# The two all-in-one files, by the stage they are named after, with the parts ComfyUI expects in each.
COMFYUI_FILES: Mapping[Stage, tuple[Stage, ...]] = {
    Stage.PRIOR: (Stage.PRIOR, Stage.TEXT_ENCODER, Stage.EFFNET_ENCODER, Stage.PREVIEWER, Stage.IMAGE_ENCODER),
    Stage.DECODER: (Stage.DECODER, Stage.TEXT_ENCODER, Stage.VQGAN),
}


def parts_of(names: Iterable[str]) -> dict[Part, list[str]]:
    """Which names stand behind which prefix; a file of one component is one part without a prefix."""
    parts: dict[Part, list[str]] = {}
    for name in names:
        part = next((part for part in PARTS if name.startswith(part.prefix)), WHOLE)
        parts.setdefault(part, []).append(name)
    return parts
