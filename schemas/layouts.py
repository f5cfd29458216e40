"""How each layout names the tensors of each stage, and the tensor names by which a file is recognised."""

import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from itertools import islice

from .keymap import KeyMap, cut, drop, rename, transpose
from .stages import CONTROLNETS, Stage
from .tensors import Shape


class Layout(StrEnum):
    """How tensors are named and filed."""

    ORIGINAL = "original"  # Stability's single files
    DIFFUSERS = "diffusers"  # one folder per component
    MODULAR = "modular"  # the same folders, with the index and the code of a modular pipeline of diffusers
    SPLIT = "split"  # as original, but q, k and v are separate tensors (kohya, OneTrainer, files saved by ComfyUI)
    COMFYUI = "comfyui"  # all-in-one files: several components, each behind a prefix
    GGUF = "gguf"  # GGUF files of prior and decoder; the names are those of the original layout


FOLDERS = (Layout.DIFFUSERS, Layout.MODULAR)  # the layouts of one folder per component, with diffusers' names

# Attention of stage B and C: torch's MultiheadAttention holds q, k, v as the rows of one matrix.
_ATTENTION = (
    *(
        cut(
            f"{{}}.attention.attn.in_proj_{kind}",
            *(f"{{}}.attention.{part}.{kind}" for part in ("to_q", "to_k", "to_v")),
        )
        for kind in ("weight", "bias")
    ),
    *(rename(f"{{}}.attention.attn.out_proj.{kind}", f"{{}}.attention.to_out.0.{kind}") for kind in ("weight", "bias")),
)
_SPLIT_ATTENTION = tuple(
    rename(f"{{}}.attention.attn.{split}.{kind}", f"{{}}.attention.{diffusers}.{kind}")
    for split, diffusers in (("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("out_proj", "to_out.0"))
    for kind in ("weight", "bias")
)
_CLIP_MAPPER = tuple(rename(f"clip_mapper.{kind}", f"clip_txt_pooled_mapper.{kind}") for kind in ("weight", "bias"))

# Original -> diffusers. The encoders have their Hugging Face names in both layouts. Files of 2022 also hold
# position_ids, a constant that transformers no longer saves.
ORIGINAL_TO_DIFFUSERS: Mapping[Stage, KeyMap] = {
    Stage.PRIOR: KeyMap(_ATTENTION),
    Stage.DECODER: KeyMap((*_ATTENTION, *_CLIP_MAPPER)),
    Stage.VQGAN: KeyMap((rename("vquantizer.codebook.weight", "vquantizer.embedding.weight"),)),
    Stage.TEXT_ENCODER: KeyMap(
        (
            drop("text_model.embeddings.position_ids"),
            drop("logit_scale"),
            rename("text_projection.weight", "text_projection.weight"),  # comes first, so that this name is written
            transpose("text_projection", "text_projection.weight"),  # older ComfyUI's CLIPSave
        )
    ),
    Stage.IMAGE_ENCODER: KeyMap((drop("vision_model.embeddings.position_ids"), drop("logit_scale"))),
    # The mean and deviation of ImageNet, which newer versions of ComfyUI save too.
    Stage.EFFNET_ENCODER: KeyMap((drop("mean"), drop("std"))),
    **dict.fromkeys((Stage.PREVIEWER, *CONTROLNETS), KeyMap()),  # one spelling
}


# Rules to the diffusers names from layouts that differ from the original one.
_DIFFERENCES: Mapping[Layout, Mapping[Stage, KeyMap]] = {
    Layout.ORIGINAL: {},
    Layout.GGUF: {},
    Layout.SPLIT: {
        Stage.PRIOR: KeyMap(_SPLIT_ATTENTION),
        Stage.DECODER: KeyMap((*_SPLIT_ATTENTION, *_CLIP_MAPPER)),
    },
    Layout.COMFYUI: {
        Stage.TEXT_ENCODER: KeyMap(
            (
                drop("transformer.text_model.embeddings.position_ids"),
                drop("logit_scale"),
                rename("transformer.text_projection.weight", "text_projection.weight"),
                transpose("text_projection", "text_projection.weight"),
                rename("transformer.{}", "{}"),
            )
        ),
    },
    **{layout: {stage: KeyMap() for stage in (Stage.PRIOR, Stage.DECODER, Stage.VQGAN)} for layout in FOLDERS},
}


def to_diffusers(stage: Stage, layout: Layout) -> KeyMap:
    """Return the rules from `layout` to the diffusers names, which the whole package uses internally."""
    return _DIFFERENCES[layout].get(stage, ORIGINAL_TO_DIFFUSERS[stage])


def can_become(stage: Stage) -> tuple[Layout, ...]:
    """Return the layouts that a stage can be written in. Split and gguf exist for prior and decoder only."""
    is_unet = stage in (Stage.PRIOR, Stage.DECODER)
    return tuple(layout for layout in Layout if is_unet or layout not in (Layout.SPLIT, Layout.GGUF))


# Tensor name -> the stage that has it. The order matters: stage C also has the later names of stage B.
STAGE_MARKS: Mapping[str, Stage] = {
    "clip_txt_mapper.weight": Stage.PRIOR,
    "effnet_mapper.0.weight": Stage.DECODER,
    "clip_mapper.weight": Stage.DECODER,
    "vquantizer.codebook.weight": Stage.VQGAN,
    "vquantizer.embedding.weight": Stage.VQGAN,
    "text_model.embeddings.token_embedding.weight": Stage.TEXT_ENCODER,
    "vision_model.embeddings.class_embedding": Stage.IMAGE_ENCODER,
    "mapper.1.running_mean": Stage.EFFNET_ENCODER,
    "blocks.11.running_mean": Stage.PREVIEWER,
}

# Every ControlNet has this tensor. The first convolution of its backbone shows its kind.
CONTROLNET_MARK = "projections.0.0.weight"
CONTROLNET_CONVOLUTIONS: Mapping[tuple[str, Shape], Stage] = {
    ("backbone.0.0.weight", (24, 1, 3, 3)): Stage.CONTROLNET_CANNY,
    ("backbone.0.0.weight", (8, 1, 3, 3)): Stage.CONTROLNET_CANNY,  # the small one for icons
    ("backbone.0.0.weight", (24, 4, 3, 3)): Stage.CONTROLNET_INPAINTING,
    ("backbone.0.0.weight", (8, 4, 3, 3)): Stage.CONTROLNET_INPAINTING,  # as narrow, none is released
    ("backbone.0.weight", (16384, 16, 1, 1)): Stage.CONTROLNET_SUPER_RESOLUTION,
    ("backbone.0.weight", (2048, 512, 3, 3)): Stage.CONTROLNET_IDENTITY,
}

# Parts of tensor names that show the layout, for stages that have more than one spelling.
LAYOUT_MARKS: Mapping[str, Layout] = {
    ".attention.attn.to_q.": Layout.SPLIT,
    ".attention.attn.": Layout.ORIGINAL,
    "clip_mapper.": Layout.ORIGINAL,
    "vquantizer.codebook.": Layout.ORIGINAL,
}

_LORA = r".*[._](lora_(A|B|down|up|mid)|hada_w[12]|lokr_w[12]|oft_(blocks|diag)|dora_scale|diff(_b)?)(\.|_[ab]$|$)"

# Descriptions of files that this package does not read, by a pattern that a tensor name begins with. Kinds of tensors
# that may be beside a network of another family come first.
FOREIGN_KINDS: Mapping[str, str] = {
    r"lora_|lycoris_|" + _LORA: "a LoRA (see `cascadekit lora`)",
    r"weights\.0\.": "a LoRA in Stability's format (see `cascadekit lora`)",
    r"(.*\.)?(exp_avg|exp_avg_sq|momentum_buffer|shadow_params)(\.|$)|optim(izers?|izer_states?)?[._]|state\.\d+\.": (
        "training state (of an optimizer or an average)"
    ),
    r"(clip_[glh](_out)?|emb_params|string_to_param\..*|<.*>)$": "a textual inversion embedding",
    r"conditioner\.embedders\.": "an SDXL checkpoint",
    r"model\.diffusion_model\.input_blocks\.": "a Stable Diffusion checkpoint (SD 1.x, 2.x or SDXL)",
    r"cond_stage_model\.|first_stage_model\.": "a Stable Diffusion 1.x or 2.x checkpoint",
    r"(.*\.)?double_blocks\.": "a Flux transformer",
    r"(.*\.)?joint_blocks\.": "an SD3 transformer",
    r"(unet\.)?down_blocks\.0\.resnets\.": "a Stable Diffusion UNet or VAE in the diffusers layout",
    r"(vae\.)?(encoder|decoder)\.(conv_in|down_blocks|mid_block|down|mid)\.": "a Stable Diffusion VAE",
    r"(.*\.)?encoder\.block\.\d+\.layer\.": "a T5 text encoder",
    r"(.*\.)?(visual\.)?transformer\.resblocks\.": (
        "a CLIP model in open_clip's spelling, which is not read; give the same model in Hugging Face's spelling, "
        "such as laion/CLIP-ViT-bigG-14-laion2B-39B-b160k or openai/clip-vit-large-patch14"
    ),
    re.escape(CONTROLNET_MARK): "a ControlNet of no kind released for Stable Cascade",
}
NAMES_LOOKED_AT = 20_000  # of an unknown file; a name that shows its kind is among the first


def stage_of(shapes: Mapping[str, Shape]) -> Stage | None:
    """Return the stage that the tensor names show, in any layout; None when they show none."""
    if CONTROLNET_MARK in shapes:
        kinds = CONTROLNET_CONVOLUTIONS.items()
        return next((stage for (name, shape), stage in kinds if shapes.get(name) == shape), None)
    return next((stage for mark, stage in STAGE_MARKS.items() if mark in shapes), None)


def layout_of(stage: Stage, shapes: Mapping[str, Shape]) -> Layout:
    """Return the layout of a stage's tensor names.

    A stage with one spelling counts as diffusers when diffusers or transformers know it, else as original."""
    if stage not in (Stage.PRIOR, Stage.DECODER, Stage.VQGAN):
        return Layout.DIFFUSERS if stage in (Stage.TEXT_ENCODER, Stage.IMAGE_ENCODER) else Layout.ORIGINAL
    found = (layout for mark, layout in LAYOUT_MARKS.items() if any(mark in name for name in shapes))
    return next(found, Layout.DIFFUSERS)


def foreign_name(names: Iterable[str]) -> str | None:
    """Describe a file of another model family by its tensor names; None when nothing fits."""
    looked_at = list(islice(names, NAMES_LOOKED_AT))
    return next(
        (what for pattern, what in FOREIGN_KINDS.items() if any(re.match(pattern, name) for name in looked_at)),
        None,
    )
