"""Matches the values of a graph with the outputs of the reference's modules, and converts one into the other.

Both have the module's path as their name. A graph keeps images channels last or as rows of channels. It may keep a
stream at 2^-k of the reference's values.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...schemas.fp16 import VQGAN_STREAM
from ...schemas.stages import Block, NetworkConfig, UNetConfig
from ...schemas.tensors import Shape
from ...schemas.unet_blocks import blocks_of, stream_of

Dims = tuple[int | None, ...]

# Graphs compute the decoder's black pixels, and the zero conditions of timestep blocks, for one row.
ONE_ROW = re.compile(r"^pixels_mapper\.|\.mapper_\w+$")
# Graphs add the constant conditions to this value, so it differs from the module's.
WITH_CONDITIONS = re.compile(r"\.mapper$")
# The graph normalises only the row of the end token.
PICKED = ("text_model.final_layer_norm",)
IN_BLOCK = re.compile(r"^(?P<way>down|up)_blocks\.(?P<position>\d+)\.\d+")
# The parts of a block that write to its stream, the block itself among them.
IN_STREAM = ("", ".depthwise", ".channelwise.2", ".channelwise.4", ".attention.to_out.0")
# The values of the VQGAN's image on its way through the decoder: blocks, their branches and what is between blocks.
IN_VQGAN = re.compile(rf"{VQGAN_STREAM}\.\d+(?:\.0|\.depthwise\.1|\.channelwise\.2)?")
BETWEEN = re.compile(r"^(?P<way>down_downscalers|up_upscalers)\.(?P<position>\d+)\.")
MAPPERS = re.compile(r"^(?P<way>down|up)_repeat_mappers\.(?P<position>\d+)\.")
EMBEDDINGS = ("embedding.2", "effnet_mapper.3", "pixels_mapper.3")
BLOCK = re.compile(
    r"(?:up|down)_blocks\.\d+(?:\.\d+)?"
    r"|(?:\w+\.)*layers\.\d+"
    r"|backbone\.\d+(?:\.\d+(?=\.block))?"
    r"|(?:projections|blocks|(?:up|down)_\w+)\.\d+"
)
PASS = re.compile(r"@\d+$")  # a further pass over the same modules


@dataclass(frozen=True)
class MappedValue:
    """A value to compare: `name` in graph and reference, `shape` in the reference, `dims` in the graph.

    The graph has 2^-`exponent` of the reference's value."""

    name: str
    shape: Shape
    dims: Dims
    exponent: int

    @property
    def nbytes(self) -> int:
        """The size of the reference's value in float32."""
        return 4 * int(np.prod(self.shape))

    def to_graph(self, value: NDArray[Any]) -> NDArray[np.float32]:
        """The reference's value as the graph has it."""
        laid = _laid(value, self.dims, one_row=bool(ONE_ROW.search(self.name)))
        assert laid is not None, self.name
        return laid * np.float32(2.0**-self.exponent) if self.exponent else laid

    def rows(self, value: NDArray[Any]) -> NDArray[np.float64]:
        """The graph's value at the reference's scale, as rows of channels."""
        first = value.ndim == 4 and value.shape == self.shape
        laid = np.moveaxis(value, 1, -1) if first else value
        return laid.reshape(-1, laid.shape[-1] if laid.ndim else 1).astype(np.float64) * 2.0**self.exponent


def match(
    shapes: Mapping[str, Shape], dims: Mapping[str, Dims], config: NetworkConfig, exponents: Mapping[str, int]
) -> list[MappedValue]:
    """The values that a graph (with `dims`) and a reference (with `shapes`) have in common, by name.

    Values of one name that hold different things are left out."""
    conditioned = isinstance(config, UNetConfig) and config.timestep_conditioning_type
    found = []
    for name, shape in shapes.items():
        if name not in dims or name in PICKED or (conditioned and WITH_CONDITIONS.search(PASS.sub("", name))):
            continue
        exponent = exponent_of(config, exponents, name) if exponents else 0
        value = np.broadcast_to(np.float32(0), shape)
        if _laid(value, dims[name], one_row=bool(ONE_ROW.search(name))) is not None:
            found.append(MappedValue(name, shape, dims[name], exponent))
    return found


def _laid(value: NDArray[Any], dims: Dims, *, one_row: bool) -> NDArray[np.float32] | None:
    """`value` of a module in the layout of a graph's value with `dims`; None if no layout fits."""
    if one_row and value.ndim == 4:
        value = value[:1, :, 0, 0]
    elif one_row:
        value = value[:1]
    candidates = [value]
    if value.ndim == 4:  # channels last; the first candidate that fits is right unless all sizes are equal
        candidates.append(value.transpose(0, 2, 3, 1))
    if len(dims) == 2 and dims[1]:
        candidates = [c.reshape(-1, c.shape[-1]) for c in candidates if c.shape[-1] == dims[1]][-1:]
    elif len(dims) == 3 and value.ndim == 4:
        candidates = [c.reshape(len(c), -1, c.shape[-1]) for c in candidates if c.shape[-1] == dims[2]][-1:]
    for candidate in candidates:
        if _fits(candidate.shape, dims):
            return np.ascontiguousarray(candidate, np.float32)
    return None


def _fits(shape: Shape, dims: Dims) -> bool:
    return len(shape) == len(dims) and all(want in (None, size) for size, want in zip(shape, dims, strict=True))


def exponent_of(config: NetworkConfig, exponents: Mapping[str, int], name: str) -> int:
    """The k of 2^-k that a graph with `exponents` keeps the module `name` at; see ``converters.onnx.streams``."""
    name = PASS.sub("", name)
    if not isinstance(config, UNetConfig):
        return exponents.get(VQGAN_STREAM, 0) if IN_VQGAN.fullmatch(name) else 0
    if block := IN_BLOCK.match(name):
        rest = name.removeprefix(block[0])
        blocks = f"{block['way']}_blocks.{block['position']}"
        if rest in IN_STREAM:
            return exponents.get(stream_of(config, blocks), 0)
        if rest == ".norm" and _sees_skip(config, block[0]):
            return exponents.get(f"down_blocks.{config.levels - 1 - int(block['position'])}", 0)
        return 0
    if between := BETWEEN.match(name):
        ahead = between["way"] == "up_upscalers"
        blocks = f"{'up' if ahead else 'down'}_blocks.{int(between['position']) + ahead}"
        return exponents.get(stream_of(config, blocks), 0)
    if mapper := MAPPERS.match(name):
        return exponents.get(stream_of(config, f"{mapper['way']}_blocks.{mapper['position']}"), 0)
    return exponents.get("down_blocks.0", 0) if name in EMBEDDINGS else 0


def _sees_skip(config: UNetConfig, block: str) -> bool:
    """True for the first residual block of a level on the way up, which joins its normalised input to the skip."""
    way, position, index = block.split(".")
    kinds = {found.name: found.kind for found in blocks_of(config)}
    return way == "up_blocks" and position != "0" and index == "0" and kinds[block] is Block.RES


def block_of(name: str) -> tuple[str, str]:
    """The block of a module, and the module's path inside: "up_blocks.1.47" and "channelwise.4", for example.

    A module outside of blocks is a block itself, up to the last number."""
    name = PASS.sub("", name)
    found = BLOCK.match(name)
    block = found[0] if found else name
    return block, name.removeprefix(block).removeprefix(".")
