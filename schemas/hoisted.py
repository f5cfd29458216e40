"""Ports of the two graphs of a prior or decoder whose conditioning is computed once instead of in every step.

The *conditioning* graph runs once for an image. From text and images it computes the keys and values of every attention
block. From the whole schedule it computes the factors and summands of every timestep block. The *step* graph takes
these as inputs and runs once for a step.
"""

from .ports import Port, StagePorts, ports_of, stage_ports
from .stages import Block, Stage, UNetConfig
from .unet_blocks import UNetBlock, blocks_of

CONDITIONING, STEP = "conditioning", "step"  # the names of the two graphs
# The stages that run as two graphs. The prior has 85 conditioning tokens beside 576 tokens of the image, and two graphs
# save 1 to 4% of a step. The decoder has 4: computing their keys and values costs less than joining them to the image's
# (see docs/graph.md).
FASTER_IN_PARTS = (Stage.PRIOR,)
# On a GPU the number of kernels counts: the decoder's step launches a quarter less than its whole graph.
FEWER_KERNELS_IN_PARTS = (Stage.PRIOR, Stage.DECODER)

MODULATION = "modulation"  # an input of the step: for each timestep block 1 + scale, then shift
EFFNET_MAP = "effnet_map"  # an input of the decoder's step, added to the embedded sample
RATIOS = "timestep_ratios"  # an input of the conditioning: the schedule
CONTEXT = "context"  # a dim: the number of conditioning tokens


def attention_ports(config: UNetConfig, dtype: str = "float32") -> tuple[Port, ...]:
    """Keys and values of the conditioning tokens for each attention block in turn: (B, tokens, c) of `dtype`."""
    return tuple(
        Port(f"{block.name}.{part}", dtype, ("batch", CONTEXT, config.block_out_channels[block.level]))
        for block in blocks_of(config)
        if block.kind is Block.ATTENTION
        for part in ("keys", "values")
    )


def timestep_blocks(config: UNetConfig) -> tuple[UNetBlock, ...]:
    """The blocks that `modulation` serves, in its order; each takes 2c of its columns."""
    return tuple(block for block in blocks_of(config) if block.kind is Block.TIMESTEP)


def modulation_width(config: UNetConfig) -> int:
    """The number of columns of `modulation`."""
    return sum(2 * config.block_out_channels[block.level] for block in timestep_blocks(config))


def conditioning_ports(config: UNetConfig, dtype: str = "float32") -> StagePorts:
    """The ports of the conditioning graph. The decoder's graph takes `sample` for its size alone.

    `dtype` is that of keys and values, outputs here and inputs of the step."""
    plain = ports_of(config)
    kept = {
        Stage.PRIOR: ("clip_text_pooled", "clip_text", "clip_img"),
        Stage.DECODER: ("sample", "clip_text_pooled", "effnet"),
    }[config.stage]
    inputs = tuple(port for port in plain.inputs if port.name in kept)
    modulation = Port(MODULATION, "float32", ("steps", modulation_width(config)))
    return stage_ports(
        (*inputs, Port(RATIOS, "float32", ("steps",))),
        (modulation, *_effnet_map(config), *attention_ports(config, dtype)),
        plain.ranges,
    )


def step_ports(config: UNetConfig, dtype: str = "float32", rows: int | str = "batch") -> StagePorts:
    """The ports of the step graph, with keys and values of `dtype`.

    Its `modulation` has `rows` of the conditioning's rows: one for each sample, or 1 for all of them."""
    plain = ports_of(config)
    inputs = (
        plain.inputs[0],
        Port(MODULATION, "float32", (rows, modulation_width(config))),
        *_effnet_map(config),
        *attention_ports(config, dtype),
    )
    return stage_ports(inputs, plain.outputs, plain.ranges)


def _effnet_map(config: UNetConfig) -> tuple[Port, ...]:
    if config.stage is Stage.PRIOR:
        return ()
    patch = config.patch_size
    dims = ("batch", f"height/{patch}", f"width/{patch}", config.block_out_channels[0])
    return (Port(EFFNET_MAP, "float32", dims),)  # channels last, like the sums of the first level
