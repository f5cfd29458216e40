"""One network as found on disk, and how its tensors differ from those the network should have."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...schemas.block_types import QUANTISED
from ...schemas.dtypes import DTYPE_SIZES, FLOATS, FP8
from ...schemas.errors import LayoutError
from ...schemas.layouts import Layout, foreign_name
from ...schemas.messages import listed
from ...schemas.quantised_facts import QuantisedFacts, facts_of, format_name
from ...schemas.stages import NetworkConfig, Stage, Variant, variant_of
from ...schemas.tensors import Shape, expected_tensors, is_counter
from ...storage.safetensors_reader import TensorRange

BLOCK = re.compile(r".*?\.\d+(?:\.\d+)?\.")  # the beginning of a tensor's name up to the number of its block

# Names of tensors that programs write beside quantised weights.
_QUANTISED = re.compile(
    r".*(scale_weight|weight_scale|scaled_fp8|scale_input|input_scale|comfy_quant|absmax|quant_map|quant_state"
    r"|qweight|qzeros|\.scb|\._data|zero_point)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Problems:
    """How the tensors of a file differ from those its network should have, by their diffusers names."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong_shape: tuple[tuple[str, Shape, Shape], ...] = ()  # name, expected, found
    wrong_dtype: tuple[tuple[str, str], ...] = ()  # name, found

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.wrong_shape or self.wrong_dtype)

    def lines(self) -> list[str]:
        """Return one line for each kind of problem found. Tensors of one block share an item."""
        shapes = [f"{name} expected {list(want)}, found {list(found)}" for name, want, found in self.wrong_shape]
        integers = [f"{name} is {found}" for name, found in self.wrong_dtype if found in DTYPE_SIZES]
        others = [f"{name} is {found}" for name, found in self.wrong_dtype if found not in DTYPE_SIZES]
        kinds: dict[str, Sequence[str]] = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "wrong shape": shapes,
            "not a floating point type": integers,
            "dtype that is not supported yet": others,
        }
        grouped = {
            kind: _by_block(items) if kind in ("missing", "unexpected") else items for kind, items in kinds.items()
        }
        return [f"{kind} ({len(kinds[kind])}): {listed(items)}" for kind, items in grouped.items() if items]

    def meaning(self) -> str:
        """Return what a file with these problems most likely is, and what to try."""
        surplus = foreign_name(self.unexpected)
        quantised = self.wrong_dtype or any(_QUANTISED.match(name) for name in self.unexpected)
        meanings = {
            "Its weights are quantised in a way that is not supported; get them in bf16, fp16 or fp32.": quantised,
            f"Among its tensors is {surplus}; give a file of the plain weights.": surplus,
            "Some of its tensors have sizes that do not fit the others: the file is of a derived model, or it mixes "
            "two models. Give a file whose tensors are all of one network.": self.wrong_shape,
            "A part of the network is missing: the file was saved in part, pruned, or cut out of a larger file. "
            "Give the file that has the whole network.": self.missing,
            "It has tensors that the network does not have: it belongs to a derived model, or more was saved into it. "
            "Give a file of the plain weights.": self.unexpected,
        }
        return next((meaning for meaning, holds in meanings.items() if holds), "")


@dataclass(frozen=True)
class Component:
    """One network as found on disk: its config, and the range of each tensor.

    `tensors` has diffusers names whatever the layout of the file: the rules from every layout to that one only rename
    and cut tensors. `path` is the file, or the index of the shards."""

    path: Path
    stage: Stage
    layout: Layout
    config: NetworkConfig
    tensors: dict[str, TensorRange]
    metadata: dict[str, str]
    problems: Problems
    dropped: tuple[str, ...] = ()  # names, in the file, of tensors that no conversion needs
    rank: int = 0  # where one file holds a stage twice, the lower rank is taken; see schemas/key_prefixes.py
    zeros: tuple[str, ...] = ()  # step counters that the file lacks, which are written as 0

    @property
    def variant(self) -> Variant:
        return variant_of(self.config)

    @property
    def dtypes(self) -> Counter[str]:
        """The number of tensors of each dtype, without step counters."""
        return Counter(tensor.dtype for name, tensor in self.tensors.items() if not is_counter(name))

    @property
    def quantised(self) -> dict[str, QuantisedFacts]:
        """The formats of quantised weights, and what is known of each."""
        groups: defaultdict[str, list[TensorRange]] = defaultdict(list)
        for tensor in self.tensors.values():
            if name := format_name(tensor.scale.kind if tensor.scale else "", tensor.dtype):
                groups[name].append(tensor)
        return {name: facts_of(name, len(tensors), _bits(tensors)) for name, tensors in groups.items()}

    @property
    def parameters(self) -> int:
        """The number of learned values, which excludes the statistics of BatchNorm."""
        buffers = ("running_mean", "running_var", "num_batches_tracked")
        return sum(math.prod(t.shape) for name, t in self.tensors.items() if not name.endswith(buffers))

    def require_sound(self) -> "Component":
        """Return this component. Raises LayoutError, listing every problem, when it has any."""
        if self.problems:
            lines = "\n  ".join(self.problems.lines())
            raise LayoutError(f"{self.path}: {self.describe()} with problems:\n  {lines}\n{self.problems.meaning()}")
        return self

    def describe(self) -> str:
        """Return a few words, such as "prior (lite, original layout)"."""
        return f"{self.stage} ({self.variant}, {self.layout} layout)"


def _bits(tensors: Iterable[TensorRange]) -> float:
    """Bits of a value, with its share of the factors."""
    stored = sum(tensor.nbytes + (tensor.scale.nbytes if tensor.scale else 0) for tensor in tensors)
    return 8 * stored / max(1, sum(math.prod(tensor.shape) for tensor in tensors))


def find_problems(config: NetworkConfig, tensors: Mapping[str, TensorRange]) -> Problems:
    """Compare `tensors` (diffusers names) with those of the network that `config` describes.

    A missing step counter of a BatchNorm is no problem: nothing computes with it, and PyTorch sets it to 0."""
    expected = expected_tensors(config)
    return Problems(
        missing=tuple(name for name in expected if name not in tensors and not is_counter(name)),
        unexpected=tuple(name for name in tensors if name not in expected),
        wrong_shape=tuple(
            (name, expected[name], tensor.shape)
            for name, tensor in tensors.items()
            if name in expected and tensor.shape != expected[name]
        ),
        wrong_dtype=tuple(
            (name, tensor.dtype)
            for name, tensor in tensors.items()
            if not is_counter(name) and tensor.dtype not in (*FLOATS, *FP8, *QUANTISED)
        ),
    )


def missing_counters(config: NetworkConfig, tensors: Mapping[str, object]) -> tuple[str, ...]:
    """Return the step counters of BatchNorms that are in the network but not among `tensors`."""
    return tuple(name for name in expected_tensors(config) if is_counter(name) and name not in tensors)


def _by_block(names: Sequence[str]) -> list[str]:
    """Join names of one numbered block into one item: "up_blocks.0.2.{kv_mapper.1.bias, kv_mapper.1.weight}"."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        match = BLOCK.match(name)
        blocks.setdefault(match[0] if match else name, []).append(name)
    return [
        members[0] if len(members) == 1 else f"{block}{{{listed([name.removeprefix(block) for name in members])}}}"
        for block, members in blocks.items()
    ]
