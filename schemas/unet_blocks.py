"""The blocks of prior and decoder in the order they run, and the streams they write to.

A *stream* is the sum that residual blocks add to, from an embedding or a resampling to the next one. The deepest level
has one stream for its way down and its way up.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from .stages import Block, UNetConfig


@dataclass(frozen=True)
class UNetBlock:
    """A block by the path of its module; `level` counts from the outermost inwards."""

    name: str
    kind: Block
    level: int


def blocks_of(config: UNetConfig) -> Iterator[UNetBlock]:
    """Yield every block once, down and up again, however often its level runs."""
    for level in range(config.levels):
        yield from _level(config, "down_blocks", level, level, config.down_num_layers_per_block[level])
    for position in range(config.levels):
        level = config.levels - 1 - position
        yield from _level(config, "up_blocks", position, level, config.up_num_layers_per_block[position])


@cache
def next_blocks(config: UNetConfig) -> Mapping[str, UNetBlock]:
    """The block after each block in the same level, by the name of the first. The last of a level has none."""
    pairs = pairwise(blocks_of(config))
    return {one.name: two for one, two in pairs if one.name.rpartition(".")[0] == two.name.rpartition(".")[0]}


def _level(config: UNetConfig, way: str, position: int, level: int, layers: int) -> Iterator[UNetBlock]:
    for index, kind in enumerate(config.block_types_per_layer[level] * layers):
        yield UNetBlock(f"{way}.{position}.{index}", kind, level)


def stream_of(config: UNetConfig, blocks: str) -> str:
    """Return the stream that `blocks`, such as "up_blocks.1", write to: their own or the deepest level's."""
    return f"down_blocks.{config.levels - 1}" if blocks == "up_blocks.0" else blocks


def streams_of(config: UNetConfig) -> tuple[str, ...]:
    """Return every stream in the order they run."""
    down = (f"down_blocks.{level}" for level in range(config.levels))
    return (*down, *(f"up_blocks.{position}" for position in range(1, config.levels)))
