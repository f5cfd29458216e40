"""Prefixes of tensor names in files that hold several components.

Such files are ComfyUI's all-in-one files, training states and whole CLIP models. Programs also wrap networks while
they train (torch.compile, DistributedDataParallel, FSDP), and each wrapper puts a word of its own into every name. This
module removes those words, whatever their number and order."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from .layouts import Layout
from .stages import Stage


@dataclass(frozen=True)
class KeyPrefix:
    """A prefix of tensor names, with the stage behind it and the layout of that stage's names.

    Without a stage the prefix says nothing about its tensors, which are identified by their names."""

    text: str
    stage: Stage | None = None
    layout: Layout | None = None
    rank: int = 0  # where two prefixes hold one stage, the lower rank is taken unless averaged weights are wanted
    wrapper: bool = False  # True for a prefix that belongs to no layout but to a program that wrapped the network


COMFYUI_PREFIXES: Mapping[Stage, str] = {
    Stage.PRIOR: "model.diffusion_model.",
    Stage.DECODER: "model.diffusion_model.",
    Stage.TEXT_ENCODER: "text_encoder.clip_g.",
    Stage.IMAGE_ENCODER: "clip_l_vision.",
    Stage.EFFNET_ENCODER: "vae.encoder.",
    Stage.PREVIEWER: "vae.previewer.",
    Stage.VQGAN: "vae.",
}

# Keys under which programs file one network of a dictionary of networks, or wrap a single network.
WRAPPERS = (
    *("module", "model", "unet", "diffusion_model", "network", "net", "transformer"),
    *("prior", "decoder", "vqgan", "text_encoder", "image_encoder", "effnet", "effnet_encoder"),
)

# A prefix that begins with another one comes before it.
KEY_PREFIXES: tuple[KeyPrefix, ...] = (
    KeyPrefix("model.diffusion_model."),  # prior or decoder, its attention joined or split
    *(
        KeyPrefix(COMFYUI_PREFIXES[stage], stage, Layout.COMFYUI)
        for stage in (
            Stage.TEXT_ENCODER,
            Stage.IMAGE_ENCODER,
            Stage.EFFNET_ENCODER,
            Stage.PREVIEWER,
            Stage.VQGAN,
        )
    ),
    KeyPrefix("clip_g.", Stage.TEXT_ENCODER, Layout.COMFYUI),  # ComfyUI's text encoder by itself
    KeyPrefix("encoder."),  # ComfyUI's VAE of stage C by itself: the effnet encoder and the previewer
    KeyPrefix("previewer."),
    KeyPrefix("generator_ema.", rank=1),
    KeyPrefix("ema_model.", rank=1),
    KeyPrefix("ema.", rank=1),
    KeyPrefix("generator."),
    KeyPrefix("state_dict."),
    *(KeyPrefix(f"{name}.", wrapper=True) for name in WRAPPERS),
)
NO_PREFIX = KeyPrefix("")

# Words that wrappers of inner modules put anywhere into a name.
_INNER_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# Training state that trainers save beside the weights, by the first word of the name.
_TRAINING_STATE = re.compile(
    r"(?:optimizers?|optimizer_states?|optim|lr_schedulers?|schedulers?|scaler|callbacks|loops|rng_states?"
    r"|global_step|step|epoch|iter)(?:\.|$)"
)

# The two towers of a CLIP model, by their names in Hugging Face models. The scale of the logits counts as text.
_TOWERS: Mapping[Stage, tuple[str, ...]] = {
    Stage.TEXT_ENCODER: ("text_model.", "text_projection", "logit_scale"),
    Stage.IMAGE_ENCODER: ("vision_model.", "visual_projection"),
}
MAX_DEPTH = 8  # prefixes within prefixes; real files have three

# The two all-in-one files by the stage that names them, with the components that ComfyUI expects in each.
COMFYUI_FILES: Mapping[Stage, tuple[Stage, ...]] = {
    Stage.PRIOR: (Stage.PRIOR, Stage.TEXT_ENCODER, Stage.EFFNET_ENCODER, Stage.PREVIEWER, Stage.IMAGE_ENCODER),
    Stage.DECODER: (Stage.DECODER, Stage.TEXT_ENCODER, Stage.VQGAN),
}


@dataclass(frozen=True)
class TensorGroup:
    """The tensors behind one prefix of a file: the name of each without the prefix, and its name in the file."""

    names: dict[str, str]  # name without the prefix -> name in the file
    prefix: str = ""
    stage: Stage | None = None
    layout: Layout | None = None
    rank: int = 0
    wrapped: bool = False  # whether a wrapper's word was removed from the names
    tower: bool = False  # whether this is one tower of a whole CLIP model

    @property
    def in_comfyui(self) -> bool:
        """True for a prefix of ComfyUI's all-in-one files."""
        return self.prefix.endswith(tuple(COMFYUI_PREFIXES.values()))


def group_by_prefix(names: Iterable[str]) -> list[TensorGroup]:
    """Sort the tensor names of a file by prefix. A file of one component gives one group without a prefix."""
    bare: dict[str, str] = {}
    for name in names:
        inner = _INNER_WRAPPERS.sub("", name)
        bare[name if inner in bare else inner] = name
    return list(_groups_below(TensorGroup(bare), 0))


def _groups_below(group: TensorGroup, depth: int) -> Iterator[TensorGroup]:
    groups: dict[KeyPrefix, dict[str, str]] = {}
    for inner, name in group.names.items():
        prefix = next((prefix for prefix in KEY_PREFIXES if inner.startswith(prefix.text)), NO_PREFIX)
        groups.setdefault(prefix, {})[inner.removeprefix(prefix.text)] = name
    for prefix, names in groups.items():
        here = TensorGroup(
            names,
            prefix=group.prefix + prefix.text,
            stage=prefix.stage,
            layout=prefix.layout,
            rank=group.rank + prefix.rank,
            wrapped=group.wrapped or prefix.wrapper,
        )
        if prefix is NO_PREFIX:
            yield from _without_training_state(here)
        elif prefix.stage is not None or depth == MAX_DEPTH:
            yield _mark_wrapped(here)
        else:
            yield from _groups_below(here, depth + 1)


def _without_training_state(group: TensorGroup) -> Iterator[TensorGroup]:
    """Yield the group without its training state, and a whole CLIP model as its two towers."""
    state = {inner: name for inner, name in group.names.items() if _TRAINING_STATE.match(inner)}
    if state and len(state) < len(group.names):
        yield replace(group, names=state)
        group = replace(group, names={inner: name for inner, name in group.names.items() if inner not in state})
    whole_clip = all(any(name.startswith(starts[0]) for name in group.names) for starts in _TOWERS.values())
    for stage, starts in _TOWERS.items() if whole_clip else ():
        tower = {inner: name for inner, name in group.names.items() if inner.startswith(starts)}
        yield _mark_wrapped(replace(group, names=tower, stage=stage, tower=True))
        group = replace(group, names={inner: name for inner, name in group.names.items() if inner not in tower})
    if group.names:
        yield _mark_wrapped(group)


def _mark_wrapped(group: TensorGroup) -> TensorGroup:
    """Return the group, marked as wrapped when a wrapper's word was removed from inside its names."""
    changed = any(name != group.prefix + inner for inner, name in group.names.items())
    return replace(group, wrapped=group.wrapped or changed)
