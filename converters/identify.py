"""What a safetensors file holds, from its header alone: stage, layout, variant, dtypes, and what is wrong with it."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..schemas.errors import LayoutError
from ..schemas.infer import infer_config
from ..schemas.layouts import Layout, foreign_name, layout_of, stage_of, to_diffusers
from ..schemas.stages import ORIGINAL_VQGAN_SCALE, NetworkConfig, Stage, Variant, VQGANConfig, variant_of
from ..schemas.tensors import Shape, expected_tensors, is_counter
from .safetensors_file import Header, TensorRange

SHOWN_PROBLEMS = 6  # of each kind; the rest are counted


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
        """One line for every kind of problem there is."""
        shapes = [f"{name} expected {list(want)}, found {list(found)}" for name, want, found in self.wrong_shape]
        dtypes = [f"{name} is {found}" for name, found in self.wrong_dtype]
        kinds = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "wrong shape": shapes,
            "not a floating point type": dtypes,
        }
        return [f"{kind} ({len(items)}): {_listed(items)}" for kind, items in kinds.items() if items]


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
    """The component a file holds; `config` when a config.json came with it, `expected` when its place says the stage.

    Raises LayoutError when the file holds no stage of the cascade, or not the expected one. Missing, surplus
    and misshapen tensors are no error here: they are reported in `problems`."""
    shapes = header.shapes
    stage = stage_of(shapes)
    if stage is None:
        what = foreign_name(shapes) or f"nothing known; its first tensor is {next(iter(shapes), 'missing')}"
        raise LayoutError(
            f"{header.path}: not a Stable Cascade stage: it holds {what}. "
            "Expected stage_a, stage_b or stage_c in the original or diffusers layout, or a CLIP encoder"
        )
    if expected and stage is not expected:
        raise LayoutError(f"{header.path}: expected the {expected} here, found the {stage}; give the right file")
    layout = layout_of(stage, shapes)
    try:
        tensors = _diffusers_tensors(header, stage, layout)
        config = config or _with_scale(infer_config(stage, _shapes(tensors)), layout)
    except LayoutError as error:
        raise LayoutError(f"{header.path}: taken for the {stage} in the {layout} layout, but {error}") from error
    problems = find_problems(config, tensors)
    return Component(header.path, stage, layout, config, tensors, header.metadata, problems)


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
            if not is_counter(name) and not tensor.dtype.startswith(("F", "BF"))
        ),
    )


def _diffusers_tensors(header: Header, stage: Stage, layout: Layout) -> dict[str, TensorRange]:
    tensors = {}
    for name, made in to_diffusers(stage, layout).apply(header.shapes).items():
        (part,) = made.parts  # towards diffusers nothing is ever joined
        source = header.tensors[part.name]
        tensors[name] = source if part.stop is None else source.rows(part.start, part.stop, made.shape)
    return tensors


def _shapes(tensors: Mapping[str, TensorRange]) -> dict[str, Shape]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _with_scale(config: NetworkConfig, layout: Layout) -> NetworkConfig:
    """Stability's code and diffusers scale the latents of the same VQGAN differently; the layout tells which."""
    if isinstance(config, VQGANConfig) and layout is Layout.ORIGINAL:
        return replace(config, scale_factor=ORIGINAL_VQGAN_SCALE)
    return config


def _listed(items: Sequence[str]) -> str:
    rest = len(items) - SHOWN_PROBLEMS
    return ", ".join(items[:SHOWN_PROBLEMS]) + (f" and {rest} more" if rest > 0 else "")
