"""What a safetensors file holds, from its header alone: stage, layout, variant, dtypes, and what is wrong with it."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from ..schemas.allinone import COMFYUI_PREFIXES, WHOLE, Part, parts_of
from ..schemas.errors import LayoutError
from ..schemas.infer import infer_config
from ..schemas.layouts import Layout, foreign_name, layout_of, stage_of, to_diffusers
from ..schemas.stages import ORIGINAL_VQGAN_SCALE, PRESETS, NetworkConfig, Stage, Variant, VQGANConfig, variant_of
from ..schemas.tensors import Shape, expected_tensors, is_counter
from .cast import FLOATS, FP8
from .safetensors_file import DTYPE_SIZES, Header, TensorRange
from .scaled_fp8 import attach_scales

SHOWN_PROBLEMS = 6  # of each kind; the rest are counted
BLOCK = re.compile(r".*?\.\d+(?:\.\d+)?\.")  # the part of a tensor's name that says its block


@dataclass(frozen=True)
class Problems:
    """How the tensors of a file differ from those its network has (names of the diffusers layout)."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong_shape: tuple[tuple[str, Shape, Shape], ...] = ()  # name, expected, found
    wrong_dtype: tuple[tuple[str, str], ...] = ()  # name, found

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.wrong_shape or self.wrong_dtype)

    def lines(self) -> list[str]:
        """One line for every kind of problem there is, tensors of one block together."""
        shapes = [f"{name} expected {list(want)}, found {list(found)}" for name, want, found in self.wrong_shape]
        integers = [f"{name} is {found}" for name, found in self.wrong_dtype if found in DTYPE_SIZES]
        others = [f"{name} is {found}" for name, found in self.wrong_dtype if found not in DTYPE_SIZES]
        kinds: dict[str, Sequence[str]] = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "wrong shape": shapes,
            "not a floating point type": integers,
            "of a dtype that is not supported yet": others,
        }
        grouped = {
            kind: _by_block(items) if kind in ("missing", "unexpected") else items for kind, items in kinds.items()
        }
        return [f"{kind} ({len(kinds[kind])}): {_listed(items)}" for kind, items in grouped.items() if items]


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
            listed = "\n  ".join(self.problems.lines())
            raise LayoutError(
                f"{self.path}: {self.describe()} with problems:\n  {listed}\n"
                "The file is damaged, cut out of a larger one, or of a derived model; get it again from its source."
            )
        return self

    def describe(self) -> str:
        """A few words, such as "prior (lite, original layout)"."""
        return f"{self.stage} ({self.variant}, {self.layout} layout)"


def identify(header: Header, config: NetworkConfig | None = None, expected: Stage | None = None) -> Component:
    """The one component a file holds; `config` when a config.json came with it, `expected` when its place says
    the stage.

    Raises LayoutError when the file holds no stage of the cascade, several, or not the expected one. Missing,
    surplus and misshapen tensors are no error here: they are reported in `problems`."""
    found = identify_parts(header, config).components
    matching = [component for component in found if expected in (None, component.stage)]
    if not matching:
        stages = ", ".join(component.stage for component in found)
        raise LayoutError(f"{header.path}: expected the {expected} here, found the {stages}; give the right file")
    return matching[0]


@dataclass(frozen=True)
class Parts:
    """The components of one file, and remarks on what else is in it."""

    components: tuple[Component, ...]
    notes: tuple[str, ...] = ()


def identify_parts(header: Header, config: NetworkConfig | None = None) -> Parts:
    """Every component a file holds, behind whatever prefix. Raises LayoutError when it holds none."""
    components = []
    header, notes = attach_scales(header)
    for part, names in parts_of(header.tensors).items():
        tensors = {name.removeprefix(part.prefix): header.tensors[name] for name in names}
        stage = part.stage or stage_of(_shapes(tensors))
        if stage is not None:
            components.append(_component(header, part, stage, tensors, config))
        elif part is not WHOLE or components:
            notes.append(f"{header.path}: left out {len(names)} tensors of no known component ({_listed(names)})")
    if not components:
        raise LayoutError(
            f"{header.path}: not a Stable Cascade component: it holds {_guess(header)}. Expected a stage, encoder, "
            "previewer or ControlNet in the original, split, diffusers or comfyui layout"
        )
    for component in components:
        if component.dropped:
            notes.append(f"{header.path}: left out {_listed(component.dropped)}, which carry nothing")
    return Parts(tuple(components), tuple(notes))


def _component(
    header: Header, part: Part, stage: Stage, tensors: dict[str, TensorRange], config: NetworkConfig | None
) -> Component:
    spelling = part.layout or layout_of(stage, _shapes(tensors))
    layout = Layout.COMFYUI if part.prefix in COMFYUI_PREFIXES.values() else spelling
    try:
        renamed, dropped = _diffusers_tensors(tensors, stage, spelling)
        config = config or _with_scale(infer_config(stage, _shapes(renamed)), layout)
    except LayoutError as error:
        raise LayoutError(f"{header.path}: taken for the {stage} in the {layout} layout, but {error}") from error
    problems = find_problems(config, renamed)
    left_out = tuple(part.prefix + name for name in dropped)
    return Component(header.path, stage, layout, config, renamed, header.metadata, problems, left_out, part.rank)


def _guess(header: Header) -> str:
    """What a file without any component most likely is."""
    foreign = foreign_name(header.shapes)
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


def find_problems(config: NetworkConfig, tensors: Mapping[str, TensorRange]) -> Problems:
    """How `tensors` (diffusers names) differ from what the network of `config` has."""
    expected = expected_tensors(config)
    return Problems(
        missing=tuple(name for name in expected if name not in tensors),
        unexpected=tuple(name for name in tensors if name not in expected),
        wrong_shape=tuple(
            (name, expected[name], tensor.shape)
            for name, tensor in tensors.items()
            if name in expected and tensor.shape != expected[name]
        ),
        wrong_dtype=tuple(
            (name, tensor.dtype)
            for name, tensor in tensors.items()
            if not is_counter(name) and tensor.dtype not in (*FLOATS, *FP8)
        ),
    )


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


def _by_block(names: Sequence[str]) -> list[str]:
    """Names that share a numbered block as one item: "up_blocks.0.2.{kv_mapper.1.bias, kv_mapper.1.weight}"."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        match = BLOCK.match(name)
        blocks.setdefault(match[0] if match else name, []).append(name)
    return [
        members[0] if len(members) == 1 else f"{block}{{{_listed([name.removeprefix(block) for name in members])}}}"
        for block, members in blocks.items()
    ]


def _listed(items: Sequence[str]) -> str:
    rest = len(items) - SHOWN_PROBLEMS
    return ", ".join(items[:SHOWN_PROBLEMS]) + (f" and {rest} more" if rest > 0 else "")
