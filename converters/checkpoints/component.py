"""How the tensors of a file differ from those its network has, and what that most likely means."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ...schemas.layouts import foreign_name
from ...schemas.stages import NetworkConfig
from ...schemas.tensors import Shape, expected_tensors, is_counter
from ...storage.cast import FLOATS, FP8
from ...storage.safetensors_header import DTYPE_SIZES

SHOWN_PROBLEMS = 6  # of each kind; the rest are counted
BLOCK = re.compile(r".*?\.\d+(?:\.\d+)?\.")  # the part of a tensor's name that says its block

# Tensors that programs put beside weights which they have quantised.
_QUANTISED = re.compile(
    r".*(scale_weight|weight_scale|scaled_fp8|scale_input|input_scale|comfy_quant|absmax|quant_map|quant_state"
    r"|qweight|qzeros|\.scb|\._data|zero_point)",
    re.IGNORECASE,
)


class Tensor(Protocol):
    """A tensor that a header describes."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> Shape: ...


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
        return [f"{kind} ({len(kinds[kind])}): {listed(items)}" for kind, items in grouped.items() if items]

    def meaning(self) -> str:
        """What a file with these problems most likely is, and what to try."""
        surplus = foreign_name(self.unexpected)
        quantised = self.wrong_dtype or any(_QUANTISED.match(name) for name in self.unexpected)
        verdicts = {
            "Its weights are quantised in a way that is not read here; get them in bf16, fp16 or fp32.": quantised,
            f"Among its tensors is {surplus}; give a file of the plain weights.": surplus,
            "Some of its tensors have other sizes than the rest asks for: it is of a derived model, or two models are "
            "mixed in it. Only networks of one make are converted.": self.wrong_shape,
            "It lacks a part of the network: it was saved in part, pruned, or cut out of a larger file. "
            "Give the file that has all of it.": self.missing,
            "It has tensors that the network does not have: it is of a derived model, or more was saved into it. "
            "Give a file of the plain weights.": self.unexpected,
        }
        return next((verdict for verdict, holds in verdicts.items() if holds), "")


def find_problems(config: NetworkConfig, tensors: Mapping[str, Tensor]) -> Problems:
    """How `tensors` (diffusers names) differ from what the network of `config` has.

    A missing step counter of a BatchNorm is none: nothing computes with it, and PyTorch takes 0 for it."""
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
            if not is_counter(name) and tensor.dtype not in (*FLOATS, *FP8)
        ),
    )


def missing_counters(config: NetworkConfig, tensors: Mapping[str, object]) -> tuple[str, ...]:
    """The step counters of BatchNorms that the network has and `tensors` lack."""
    return tuple(name for name in expected_tensors(config) if is_counter(name) and name not in tensors)


def _by_block(names: Sequence[str]) -> list[str]:
    """Names that share a numbered block as one item: "up_blocks.0.2.{kv_mapper.1.bias, kv_mapper.1.weight}"."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        match = BLOCK.match(name)
        blocks.setdefault(match[0] if match else name, []).append(name)
    return [
        members[0] if len(members) == 1 else f"{block}{{{listed([name.removeprefix(block) for name in members])}}}"
        for block, members in blocks.items()
    ]


def listed(items: Sequence[str]) -> str:
    """The first few items, and how many there are beyond them."""
    rest = len(items) - SHOWN_PROBLEMS
    return ", ".join(items[:SHOWN_PROBLEMS]) + (f" and {rest} more" if rest > 0 else "")
