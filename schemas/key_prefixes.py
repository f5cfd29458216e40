"""Files that hold several components, each behind a prefix: ComfyUI's all-in-one files, training states, whole CLIPs.

Programs wrap networks while they train (torch.compile, DistributedDataParallel, FSDP), and each wrapper puts a piece
of its own into every name. Those pieces are taken off here, whatever their number and order."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from .layouts import Layout
from .stages import Stage


@dataclass(frozen=True)
class Part:
    """What stands behind a prefix: `stage` in the names of `layout`, or where these are None whatever it is."""

    prefix: str
    stage: Stage | None = None
    layout: Layout | None = None
    rank: int = 0  # of two parts holding one stage the lower rank is taken, unless the other is asked for
    wrapper: bool = False  # a prefix that no layout has: a program put it there


COMFYUI_PREFIXES: Mapping[Stage, str] = {
    Stage.PRIOR: "model.diffusion_model.",
    Stage.DECODER: "model.diffusion_model.",
    Stage.TEXT_ENCODER: "text_encoder.clip_g.",
    Stage.IMAGE_ENCODER: "clip_l_vision.",
    Stage.EFFNET_ENCODER: "vae.encoder.",
    Stage.PREVIEWER: "vae.previewer.",
    Stage.VQGAN: "vae.",
}

# Keys under which programs keep one network's names, and dictionaries of several networks.
WRAPPERS = (
    *("module", "model", "unet", "diffusion_model", "network", "net", "transformer"),
    *("prior", "decoder", "vqgan", "text_encoder", "image_encoder", "effnet", "effnet_encoder"),
)

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
    Part("clip_g.", Stage.TEXT_ENCODER, Layout.COMFYUI),  # ComfyUI's text encoder by itself
    Part("encoder."),  # ComfyUI's VAE of stage C by itself: the effnet encoder and the previewer
    Part("previewer."),
    Part("generator_ema.", rank=1),
    Part("ema_model.", rank=1),
    Part("ema.", rank=1),
    Part("generator."),
    Part("state_dict."),
    *(Part(f"{name}.", wrapper=True) for name in WRAPPERS),
)
WHOLE = Part("")

# Wrappers of inner modules stand anywhere in a name.
_INNER_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# What trainers save beside the weights, by the first piece of the name.
_TRAINING_STATE = re.compile(
    r"(?:optimizers?|optimizer_states?|optim|lr_schedulers?|schedulers?|scaler|callbacks|loops|rng_states?"
    r"|global_step|step|epoch|iter)(?:\.|$)"
)

# The two towers of a CLIP model, in the names of Hugging Face; the scale of its logits goes with the text.
_TOWERS: Mapping[Stage, tuple[str, ...]] = {
    Stage.TEXT_ENCODER: ("text_model.", "text_projection", "logit_scale"),
    Stage.IMAGE_ENCODER: ("vision_model.", "visual_projection"),
}
DEEPEST = 8  # prefixes within prefixes; real files have three

# The two all-in-one files, by the stage they are named after, with the parts ComfyUI expects in each.
COMFYUI_FILES: Mapping[Stage, tuple[Stage, ...]] = {
    Stage.PRIOR: (Stage.PRIOR, Stage.TEXT_ENCODER, Stage.EFFNET_ENCODER, Stage.PREVIEWER, Stage.IMAGE_ENCODER),
    Stage.DECODER: (Stage.DECODER, Stage.TEXT_ENCODER, Stage.VQGAN),
}


@dataclass(frozen=True)
class Found:
    """The tensors behind one prefix of a file, by their names without it; the values are the names in the file."""

    names: dict[str, str]
    prefix: str = ""
    stage: Stage | None = None
    layout: Layout | None = None
    rank: int = 0
    wrapped: bool = False  # a wrapper's piece was taken off the names
    tower: bool = False  # one of the two towers of a whole CLIP model

    @property
    def in_comfyui(self) -> bool:
        """Whether ComfyUI's all-in-one files have this prefix."""
        return self.prefix.endswith(tuple(COMFYUI_PREFIXES.values()))


def parts_of(names: Iterable[str]) -> list[Found]:
    """Which tensors stand behind which prefix; a file of one component is one part without a prefix."""
    bare: dict[str, str] = {}
    for name in names:
        inner = _INNER_WRAPPERS.sub("", name)
        bare[name if inner in bare else inner] = name
    return list(_parts_below(Found(bare), 0))


def _parts_below(found: Found, depth: int) -> Iterator[Found]:
    groups: dict[Part, dict[str, str]] = {}
    for inner, name in found.names.items():
        part = next((part for part in PARTS if inner.startswith(part.prefix)), WHOLE)
        groups.setdefault(part, {})[inner.removeprefix(part.prefix)] = name
    for part, group in groups.items():
        here = Found(
            group,
            found.prefix + part.prefix,
            part.stage,
            part.layout,
            found.rank + part.rank,
            found.wrapped or part.wrapper,
        )
        if part is WHOLE:
            yield from _taken_apart(here)
        elif part.stage is not None or depth == DEEPEST:
            yield _marked(here)
        else:
            yield from _parts_below(here, depth + 1)


def _taken_apart(found: Found) -> Iterator[Found]:
    """The part without the training state in it, and a whole CLIP model as its two towers."""
    state = {inner: name for inner, name in found.names.items() if _TRAINING_STATE.match(inner)}
    if state and len(state) < len(found.names):
        yield replace(found, names=state)
        found = replace(found, names={inner: name for inner, name in found.names.items() if inner not in state})
    whole_clip = all(any(name.startswith(starts[0]) for name in found.names) for starts in _TOWERS.values())
    for stage, starts in _TOWERS.items() if whole_clip else ():
        tower = {inner: name for inner, name in found.names.items() if inner.startswith(starts)}
        yield _marked(replace(found, names=tower, stage=stage, tower=True))
        found = replace(found, names={inner: name for inner, name in found.names.items() if inner not in tower})
    if found.names:
        yield _marked(found)


def _marked(found: Found) -> Found:
    """The part, which knows whether pieces inside its names were taken off too."""
    changed = any(name != found.prefix + inner for inner, name in found.names.items())
    return replace(found, wrapped=found.wrapped or changed)
