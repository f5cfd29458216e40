"""The blocks of prior and decoder in the order they run, and the streams they write to.

A *stream* is the sum that residual blocks add to: it begins at an embedding or a resampling and ends at the next
one. The deepest level's way up goes on with the stream of its way down.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from .stages import Block, UNetConfig


@dataclass(frozen=True)
class UNetBlock:
    """A block by the path of its module; `level` counts from the outermost inwards."""

    name: str
    kind: Block
    level: int


def blocks_of(config: UNetConfig) -> Iterator[UNetBlock]:
    """Every block once, down and up again, whatever number of passes is made over its level."""
    for level in range(config.levels):
        yield from _level(config, "down_blocks", level, level, config.down_num_layers_per_block[level])
    for position in range(config.levels):
        level = config.levels - 1 - position
        yield from _level(config, "up_blocks", position, level, config.up_num_layers_per_block[position])


def _level(config: UNetConfig, way: str, position: int, level: int, layers: int) -> Iterator[UNetBlock]:
    for index, kind in enumerate(config.block_types_per_layer[level] * layers):
        yield UNetBlock(f"{way}.{position}.{index}", kind, level)


def stream_of(config: UNetConfig, blocks: str) -> str:
    """The stream that the blocks called `blocks`, such as "up_blocks.1", write to: itself or the deepest level's."""
    return f"down_blocks.{config.levels - 1}" if blocks == "up_blocks.0" else blocks


def streams_of(config: UNetConfig) -> tuple[str, ...]:
    """Every stream, in the order they run."""
    down = (f"down_blocks.{level}" for level in range(config.levels))
    return (*down, *(f"up_blocks.{position}" for position in range(1, config.levels)))
