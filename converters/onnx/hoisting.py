"""Writes the outputs of the conditioning graphs: the inputs of the step graphs, see ``schemas.hoisted``."""

from ...schemas.hoisted import MODULATION, timestep_blocks
from ...schemas.stages import Block, UNetConfig
from ...schemas.unet_blocks import blocks_of
from .conditions import Computed
from .graph import Graph


def write_conditions(graph: Graph, config: UNetConfig, conditions: Computed) -> None:
    """The outputs `modulation` (steps, columns) and, for every attention block, keys and values (B, tokens, c)."""
    columns = [
        part
        for block in timestep_blocks(config)
        for part in conditions.scale_and_shift(block.name, config.block_out_channels[block.level])
    ]
    graph.node("Concat", MODULATION, *columns, axis=1)
    for block in blocks_of(config):
        if block.kind is Block.ATTENTION:
            _keys_and_values(graph, block.name, config.block_out_channels[block.level], conditions)


def _keys_and_values(graph: Graph, name: str, width: int, conditions: Computed) -> None:
    rows = graph.rows(conditions.given(name, width), width)
    parts = graph.linears(f"{name}.attention", ("to_k", "to_v"), rows)
    shape = graph.shape(graph.batch, -1, width)
    for output, part in zip(("keys", "values"), parts, strict=True):
        graph.node("Reshape", f"{name}.{output}", part, shape)
