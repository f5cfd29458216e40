"""How each layout names the tensors of each stage, and the marks by which a file is recognised."""

from collections.abc import Mapping
from enum import StrEnum

from .keymap import Drop, KeyMap, Rename, SplitRows
from .stages import Stage
from .tensors import Shape


class Layout(StrEnum):
    """How tensors are named and filed."""

    ORIGINAL = "original"  # Stability's single files
    DIFFUSERS = "diffusers"  # one folder per component ("modular")


# Attention of stage B and C: torch's MultiheadAttention holds q, k, v as the rows of one matrix.
_ATTENTION = (
    SplitRows(
        "{}.attention.attn.in_proj_weight",
        ("{}.attention.to_q.weight", "{}.attention.to_k.weight", "{}.attention.to_v.weight"),
    ),
    SplitRows(
        "{}.attention.attn.in_proj_bias",
        ("{}.attention.to_q.bias", "{}.attention.to_k.bias", "{}.attention.to_v.bias"),
    ),
    Rename("{}.attention.attn.out_proj.weight", "{}.attention.to_out.0.weight"),
    Rename("{}.attention.attn.out_proj.bias", "{}.attention.to_out.0.bias"),
)

# Original -> diffusers. The encoders carry their Hugging Face names in either layout; files of 2022
# also hold position_ids, a constant that transformers stopped saving.
ORIGINAL_TO_DIFFUSERS: Mapping[Stage, KeyMap] = {
    Stage.PRIOR: KeyMap(_ATTENTION),
    Stage.DECODER: KeyMap(
        (
            *_ATTENTION,
            Rename("clip_mapper.weight", "clip_txt_pooled_mapper.weight"),
            Rename("clip_mapper.bias", "clip_txt_pooled_mapper.bias"),
        )
    ),
    Stage.VQGAN: KeyMap((Rename("vquantizer.codebook.weight", "vquantizer.embedding.weight"),)),
    Stage.TEXT_ENCODER: KeyMap((Drop("text_model.embeddings.position_ids"),)),
    Stage.IMAGE_ENCODER: KeyMap((Drop("vision_model.embeddings.position_ids"),)),
}


def to_diffusers(stage: Stage, layout: Layout) -> KeyMap:
    """The rules from `layout` to the diffusers names, which are the names used everywhere inside."""
    if layout is Layout.ORIGINAL or stage in (Stage.TEXT_ENCODER, Stage.IMAGE_ENCODER):
        return ORIGINAL_TO_DIFFUSERS[stage]
    return KeyMap()


# A tensor that tells the stage. In this order: stage C holds the later marks of stage B too.
STAGE_MARKS: Mapping[str, Stage] = {
    "clip_txt_mapper.weight": Stage.PRIOR,
    "effnet_mapper.0.weight": Stage.DECODER,
    "clip_mapper.weight": Stage.DECODER,
    "vquantizer.codebook.weight": Stage.VQGAN,
    "vquantizer.embedding.weight": Stage.VQGAN,
    "text_model.embeddings.token_embedding.weight": Stage.TEXT_ENCODER,
    "vision_model.embeddings.class_embedding": Stage.IMAGE_ENCODER,
}

# A piece of a tensor's name that tells the layout, where a stage has more than one spelling.
ORIGINAL_MARKS: Mapping[Stage, tuple[str, ...]] = {
    Stage.PRIOR: (".attention.attn.",),
    Stage.DECODER: (".attention.attn.", "clip_mapper."),
    Stage.VQGAN: ("vquantizer.codebook.",),
}

# What a file is when it is nothing this package reads, by the beginning of a tensor's name.
FOREIGN_MARKS: Mapping[str, str] = {
    "conditioner.embedders.": "an SDXL checkpoint",
    "model.diffusion_model.input_blocks.": "a Stable Diffusion checkpoint (SD 1.x, 2.x or SDXL)",
    "cond_stage_model.": "a Stable Diffusion 1.x or 2.x checkpoint",
    "model.diffusion_model.clf.": "a ComfyUI all-in-one Stable Cascade file (not read yet)",
    "double_blocks.": "a Flux transformer",
    "joint_blocks.": "an SD3 transformer",
    "down_blocks.0.resnets.": "a Stable Diffusion UNet or VAE in the diffusers layout",
    "backbone.": "an effnet encoder or a ControlNet of Stable Cascade (not read yet)",
    "blocks.0.": "perhaps the previewer of Stable Cascade (not read yet)",
    "lora_": "a LoRA (not read yet)",
    "weights.0.": "a LoRA in Stability's format (not read yet)",
}


def stage_of(shapes: Mapping[str, Shape]) -> Stage | None:
    """The stage whose mark is among the tensor names, in either layout."""
    return next((stage for mark, stage in STAGE_MARKS.items() if mark in shapes), None)


def layout_of(stage: Stage, shapes: Mapping[str, Shape]) -> Layout:
    """The layout a stage's tensor names are in. The encoders have one spelling, filed under diffusers."""
    marks = ORIGINAL_MARKS.get(stage, ())
    found = any(mark in name for name in shapes for mark in marks)
    return Layout.ORIGINAL if found else Layout.DIFFUSERS


def foreign_name(shapes: Mapping[str, Shape]) -> str | None:
    """What a file of another model family most likely is."""
    return next(
        (what for mark, what in FOREIGN_MARKS.items() if any(name.startswith(mark) for name in shapes)),
        None,
    )
