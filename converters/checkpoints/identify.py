"""Identifies the components in a weights file from its header: stage, layout and config of each network."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache

from ...schemas.errors import ForeignError, LayoutError
from ...schemas.infer_config import infer_config
from ...schemas.key_prefixes import TensorGroup, group_by_prefix
from ...schemas.layouts import Layout, foreign_name, layout_of, stage_of, to_diffusers
from ...schemas.messages import listed
from ...schemas.stages import ORIGINAL_VQGAN_SCALE, PRESETS, NetworkConfig, Stage, VQGANConfig
from ...schemas.tensors import Shape, expected_tensors
from ...storage.renamed_tensors import diffusers_tensors, shapes_of
from ...storage.safetensors_reader import Header
from .attach_quantised import attach_quantised
from .component import Component, find_problems, missing_counters

# Returns the config in a file beside a stage's tensors, which have these shapes; None when there is no such file.
ReadConfig = Callable[[Stage, Mapping[str, Shape]], NetworkConfig | None]


@dataclass(frozen=True)
class FileContents:
    """The components of one file, and notes for the user on everything else in it."""

    components: tuple[Component, ...]
    notes: tuple[str, ...] = ()


def identify_all(
    header: Header,
    read_config: ReadConfig = lambda stage, shapes: None,
    *,
    only: Stage | None = None,
    without: Collection[Stage] = (),
) -> FileContents:
    """Return every component of a file, behind whatever prefix its tensors have.

    `only` names the one stage to take, where the place of the file says which. `without` names stages to leave out,
    even damaged ones, because the user gave them separately.

    Raises ForeignError when the file holds no component, and LayoutError when it does not hold `only` or when a
    network's config cannot be read. Missing, unexpected and misshapen tensors are no error here: they are listed in
    `Component.problems`."""
    header, notes = attach_quantised(header)
    components: list[Component] = []
    others: list[Stage] = []
    refused: list[LayoutError] = []
    for group in group_by_prefix(header.tensors):
        shapes = {inner: header.tensors[name].shape for inner, name in group.names.items()}
        stage = group.stage or stage_of(shapes)
        if stage is None or (foreign := _foreign_kind(group, stage, shapes)):
            kind = foreign_name(group.names) if stage is None else foreign
            what = f"{len(shapes)} tensors of {kind or 'no known component'}"
            notes.append(f"{header.path}: left out {what} ({listed([*group.names])})")
        elif only not in (None, stage) or stage in without:
            others.append(stage)
            reason = "for the one given" if stage in without else f"as the {only} was asked for"
            notes.append(f"{header.path}: its {stage} ({len(shapes)} tensors) is left out, {reason}")
        else:
            try:
                components.append(_component(header, group, stage, read_config))
                notes += _wrapper_note(header, group, stage)
            except LayoutError as error:
                if not group.tower or only is not None:
                    raise
                refused.append(error)
    if components:
        notes += [f"left out: {error}" for error in refused]
    elif refused:
        raise refused[0]
    elif others and not without:
        raise LayoutError(
            f"{header.path}: expected the {only} here, found the {', '.join(others)}; give the right file"
        )
    elif not others:
        raise _foreign(header)
    notes += [note for component in components for note in _tensor_notes(component)]
    return FileContents(tuple(components), tuple(notes))


def _foreign_kind(group: TensorGroup, stage: Stage, shapes: Mapping[str, Shape]) -> str | None:
    """Return the name of another model's VAE that has the VQGAN's prefix; None for a VQGAN and other stages."""
    return foreign_name(group.names) if group.stage and stage is Stage.VQGAN and stage_of(shapes) is None else None


def _wrapper_note(header: Header, group: TensorGroup, stage: Stage) -> list[str]:
    """Return a note on tensor names that a program wrapped, with the first name before and after."""
    if not group.wrapped:
        return []
    inner, name = next(iter(group.names.items()))
    return [f"{header.path}: the {stage} is read without what a wrapper added to its names ({name} is {inner})"]


def _tensor_notes(component: Component) -> list[str]:
    """Return notes on tensors that are left out, and on counters that are written as 0."""
    notes = []
    if component.dropped:
        notes.append(f"{component.path}: left out {listed(component.dropped)}, which no layout needs")
    if component.zeros:
        notes.append(
            f"{component.path}: the {component.stage} has no {listed(component.zeros)}; nothing computes with these "
            "counters, and they are written as 0"
        )
    return notes


def _component(header: Header, group: TensorGroup, stage: Stage, read_config: ReadConfig) -> Component:
    tensors = {inner: header.tensors[name] for inner, name in group.names.items()}
    spelling = group.layout or layout_of(stage, shapes_of(tensors))
    layout = Layout.GGUF if header.gguf else Layout.COMFYUI if group.in_comfyui else spelling
    try:
        renamed, dropped = diffusers_tensors(tensors, stage, spelling)
        given = read_config(stage, shapes_of(renamed))
        config = given or _with_scale(infer_config(stage, shapes_of(renamed)), layout)
    except LayoutError as error:
        raise type(error)(f"{header.path}: taken for the {stage} in the {layout} layout, but {error}") from error
    return Component(
        path=header.path,
        stage=stage,
        layout=layout,
        config=config,
        tensors=renamed,
        metadata=header.metadata,
        problems=find_problems(config, renamed),
        dropped=tuple(group.names[name] for name in dropped),
        rank=group.rank,
        zeros=missing_counters(config, renamed),
    )


def _with_scale(config: NetworkConfig, layout: Layout) -> NetworkConfig:
    """Set the VQGAN's scale by the layout: Stability's code and diffusers scale the same latents differently."""
    if isinstance(config, VQGANConfig) and layout is not Layout.DIFFUSERS:
        return replace(config, scale_factor=ORIGINAL_VQGAN_SCALE)
    return config


def _foreign(header: Header) -> ForeignError:
    """Return the error for a file without any component, which says what the file most likely is."""
    unknown = f"nothing known; its first tensor is {next(iter(header.tensors), 'missing')}"
    found = foreign_name(header.tensors) or nearest_known(header.shapes) or unknown
    return ForeignError(
        f"{header.path}: not a Stable Cascade component: it holds {found}. Expected a stage, encoder, previewer or "
        "ControlNet in the original, split, diffusers or comfyui layout"
    )


def nearest_known(shapes: Mapping[str, Shape]) -> str | None:
    """Describe the released file that shares most tensors (name and shape) with `shapes`.

    For example: "82% of the prior (lite, original layout); the first tensor that differs is clf.1.bias". None when at
    most 5% of the tensors are equal."""
    best = (0.05, "")
    for what, known in _released_files().items():
        differing = [name for name, shape in known.items() if shapes.get(name) != shape]
        share = 1 - len(differing) / len(known)
        if share > best[0]:
            first = f"; the first tensor that differs is {differing[0]}" if differing else ""
            best = (share, f"{share:.0%} of the {what}{first}")
    return best[1] or None


@cache
def _released_files() -> dict[str, dict[str, Shape]]:
    """Return the tensor shapes of every released file, by a description of the file."""
    files = {}
    for (stage, variant), preset in PRESETS.items():
        for layout in (Layout.ORIGINAL, Layout.DIFFUSERS):
            mapped = to_diffusers(stage, layout).inverse.apply(expected_tensors(preset))
            files[f"{stage} ({variant}, {layout} layout)"] = {name: tensor.shape for name, tensor in mapped.items()}
    return files
