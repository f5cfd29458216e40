"""What a weights file holds, from its header alone: stage, layout, variant, dtypes, and what is wrong with it."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from ...schemas.errors import ForeignError, LayoutError
from ...schemas.infer_config import infer_config
from ...schemas.key_prefixes import Found, parts_of
from ...schemas.layouts import Layout, foreign_name, layout_of, stage_of, to_diffusers
from ...schemas.stages import ORIGINAL_VQGAN_SCALE, PRESETS, NetworkConfig, Stage, Variant, VQGANConfig, variant_of
from ...schemas.tensors import Shape, expected_tensors, is_counter
from ...storage.safetensors_header import Header, TensorRange
from .component import Problems, find_problems, listed, missing_counters
from .scaled_fp8 import attach_scales

__all__ = ["Component", "Parts", "Problems", "find_problems", "identify", "identify_parts", "nearest_known"]

# The config of a stage that came with its tensors, which have these shapes; None when only the tensors tell.
Configs = Callable[[Stage, Mapping[str, Shape]], NetworkConfig | None]


@dataclass(frozen=True)
class Component:
    """One network as found on disk. Its tensors go by their diffusers names whatever layout they lie in,
    since from any layout to that one there are only renames and cuts."""

    path: Path
    stage: Stage
    layout: Layout
    config: NetworkConfig
    tensors: dict[str, TensorRange]
    metadata: dict[str, str]
    problems: Problems
    dropped: tuple[str, ...] = ()  # tensors that carry nothing, by their names in the file
    rank: int = 0  # of two in one file the lower rank is taken, see schemas.allinone
    zeros: tuple[str, ...] = ()  # step counters that the file lacks; they are written as 0

    @property
    def variant(self) -> Variant:
        return variant_of(self.config)

    @property
    def dtypes(self) -> Counter[str]:
        """Number of tensors of each dtype, step counters left out."""
        return Counter(tensor.dtype for name, tensor in self.tensors.items() if not is_counter(name))

    @property
    def parameters(self) -> int:
        """Number of learned values: all elements but BatchNorm's statistics."""
        buffers = ("running_mean", "running_var", "num_batches_tracked")
        return sum(math.prod(t.shape) for name, t in self.tensors.items() if not name.endswith(buffers))

    def require_sound(self) -> "Component":
        """This component, or a LayoutError that lists everything wrong with it."""
        if self.problems:
            lines = "\n  ".join(self.problems.lines())
            raise LayoutError(f"{self.path}: {self.describe()} with problems:\n  {lines}\n{self.problems.meaning()}")
        return self

    def describe(self) -> str:
        """A few words, such as "prior (lite, original layout)"."""
        return f"{self.stage} ({self.variant}, {self.layout} layout)"


@dataclass(frozen=True)
class Parts:
    """The components of one file, and remarks on what else is in it."""

    components: tuple[Component, ...]
    notes: tuple[str, ...] = ()


def identify(header: Header) -> Component:
    """The first component a file holds. Raises LayoutError as identify_parts does."""
    return identify_parts(header).components[0]


def identify_parts(
    header: Header,
    configs: Configs = lambda stage, shapes: None,
    *,
    only: Stage | None = None,
    without: Collection[Stage] = (),
) -> Parts:
    """Every component a file holds, behind whatever prefix; `only` one stage where its place says which, and
    `without` stages that are given apart, whatever state they are in.

    Raises ForeignError when the file holds no component, LayoutError when it does not hold `only`, or holds a
    network whose config cannot be read. Missing, surplus and misshapen tensors are no error here: they are
    reported in `problems`."""
    header, notes = attach_scales(header)
    components: list[Component] = []
    others: list[Stage] = []
    refused: list[LayoutError] = []
    for found in parts_of(header.tensors):
        shapes = {inner: header.tensors[name].shape for inner, name in found.names.items()}
        stage = found.stage or stage_of(shapes)
        if stage is None or (foreign := _foreign_part(found, stage, shapes)):
            what = foreign_name(found.names) if stage is None else foreign
            notes.append(_left_out(header, f"{len(shapes)} tensors of {what or 'no known component'}", [*found.names]))
        elif only not in (None, stage) or stage in without:
            others.append(stage)
            reason = "for the one given" if stage in without else f"as the {only} was asked for"
            notes.append(f"{header.path}: its {stage} ({len(shapes)} tensors) is left out, {reason}")
        else:
            try:
                components.append(_component(header, found, stage, configs))
                notes += _wrapper_note(header, found, stage)
            except LayoutError as error:
                if not found.tower or only is not None:
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
        raise ForeignError(
            f"{header.path}: not a Stable Cascade component: it holds {_guess(header)}. Expected a stage, encoder, "
            "previewer or ControlNet in the original, split, diffusers or comfyui layout"
        )
    notes += [note for component in components for note in _remarks(component)]
    return Parts(tuple(components), tuple(notes))


def _foreign_part(found: Found, stage: Stage, shapes: Mapping[str, Shape]) -> str | None:
    """What stands in the place of `stage` when it bears no mark of it and is known to be something else."""
    return foreign_name(found.names) if found.stage and stage is Stage.VQGAN and stage_of(shapes) is None else None


def _wrapper_note(header: Header, found: Found, stage: Stage) -> list[str]:
    """A remark on names that a program wrapped, with the first of them before and after."""
    inner, name = next(iter(found.names.items()))
    said = f"{header.path}: the {stage} is read without what a wrapper added to its names ({name} is {inner})"
    return [said] if found.wrapped else []


def _left_out(header: Header, what: str, names: list[str]) -> str:
    return f"{header.path}: left out {what} ({listed(names)})"


def _remarks(component: Component) -> list[str]:
    """What the user should know of a component's tensors."""
    remarks = []
    if component.dropped:
        remarks.append(f"{component.path}: left out {listed(component.dropped)}, which carry nothing")
    if component.zeros:
        remarks.append(
            f"{component.path}: the {component.stage} has no {listed(component.zeros)}; nothing computes with these "
            "counters, and they are written as 0"
        )
    return remarks


def _component(header: Header, found: Found, stage: Stage, configs: Configs) -> Component:
    tensors = {inner: header.tensors[name] for inner, name in found.names.items()}
    spelling = found.layout or layout_of(stage, _shapes(tensors))
    layout = Layout.COMFYUI if found.in_comfyui else spelling
    try:
        renamed, dropped = _diffusers_tensors(tensors, stage, spelling)
        given = configs(stage, _shapes(renamed))
        config = given or _with_scale(infer_config(stage, _shapes(renamed)), layout)
    except LayoutError as error:
        raise type(error)(f"{header.path}: taken for the {stage} in the {layout} layout, but {error}") from error
    problems = find_problems(config, renamed)
    left_out = tuple(found.names[name] for name in dropped)
    zeros = missing_counters(config, renamed)
    return Component(
        header.path, stage, layout, config, renamed, header.metadata, problems, left_out, found.rank, zeros
    )


def _guess(header: Header) -> str:
    """What a file without any component most likely is."""
    foreign = foreign_name(header.tensors)
    if foreign:
        return foreign
    nearest = nearest_known(header.shapes)
    if nearest:
        return nearest
    return f"nothing known; its first tensor is {next(iter(header.tensors), 'missing')}"


def nearest_known(shapes: Mapping[str, Shape], least: float = 0.05) -> str | None:
    """The known file that shares most tensors, names and shapes both: "82% of the prior (lite, original layout);
    the first tensor that differs is clf.1.bias". None below the share `least`."""
    best: tuple[float, str] = (least, "")
    for what, known in _known_files().items():
        differing = [name for name, shape in known.items() if shapes.get(name) != shape]
        share = 1 - len(differing) / len(known)
        if share > best[0]:
            first = f"; the first tensor that differs is {differing[0]}" if differing else ""
            best = (share, f"{share:.0%} of the {what}{first}")
    return best[1] or None


@cache
def _known_files() -> dict[str, dict[str, Shape]]:
    """Names and shapes of every released file, by what it is."""
    files = {}
    for (stage, variant), preset in PRESETS.items():
        for layout in (Layout.ORIGINAL, Layout.DIFFUSERS):
            made = to_diffusers(stage, layout).inverse.apply(expected_tensors(preset))
            files[f"{stage} ({variant}, {layout} layout)"] = {name: tensor.shape for name, tensor in made.items()}
    return files


def _diffusers_tensors(
    tensors: Mapping[str, TensorRange], stage: Stage, layout: Layout
) -> tuple[dict[str, TensorRange], list[str]]:
    """The tensors by their diffusers names, and the names of those that have none."""
    renamed = {}
    used = set()
    for name, made in to_diffusers(stage, layout).apply(_shapes(tensors)).items():
        (part,) = made.parts  # towards diffusers nothing is ever joined
        source = tensors[part.name]
        used.add(part.name)
        if part.transposed:
            source = replace(source, shape=made.shape, transposed=True)
        renamed[name] = source if part.stop is None else source.rows(part.start, part.stop, made.shape)
    return renamed, [name for name in tensors if name not in used]


def _shapes(tensors: Mapping[str, TensorRange]) -> dict[str, Shape]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _with_scale(config: NetworkConfig, layout: Layout) -> NetworkConfig:
    """Stability's code and diffusers scale the latents of the same VQGAN differently; the layout tells which."""
    if isinstance(config, VQGANConfig) and layout is not Layout.DIFFUSERS:
        return replace(config, scale_factor=ORIGINAL_VQGAN_SCALE)
    return config
