"""Ports of the two graphs a prior or decoder falls into when its conditioning is taken out of the step.

The *conditioning* graph runs once for an image: from text, images and the whole schedule of timesteps to the keys
and values of every attention block and to the factors and summands of every timestep block. The *step* graph runs
once for a step and takes them as inputs.
"""

from .ports import Port, StagePorts, ports_of, stage_ports
from .stages import Block, Stage, UNetConfig
from .unet_blocks import UNetBlock, blocks_of

CONDITIONING, STEP = "conditioning", "step"  # the names of the two graphs
# The stages that run as two graphs. The prior has 85 conditioning tokens beside 576 tokens of the image, and two graphs
# save 1 to 4% of a step. The decoder has 4: computing their keys and values costs less than joining them to the image's
# (see docs/graph.md).
FASTER_IN_PARTS = (Stage.PRIOR,)

MODULATION = "modulation"  # the step's input: for each timestep block 1 + scale, then shift
EFFNET_MAP = "effnet_map"  # the decoder's: what is added to the embedded sample
RATIOS = "timestep_ratios"  # the conditioning's input: the schedule
# Dims: how many tokens the conditions make, the sample's size after the patch embedding
CONTEXT = "context"


def attention_ports(config: UNetConfig) -> tuple[Port, ...]:
    """Keys and values of the conditioning tokens, of every attention block in turn: (B, tokens, c) float32."""
    return tuple(
        Port(f"{block.name}.{part}", "float32", ("batch", CONTEXT, config.block_out_channels[block.level]))
        for block in blocks_of(config)
        if block.kind is Block.ATTENTION
        for part in ("keys", "values")
    )


def timestep_blocks(config: UNetConfig) -> tuple[UNetBlock, ...]:
    """The blocks that `modulation` is for, in its order; each has 2c of its columns."""
    return tuple(block for block in blocks_of(config) if block.kind is Block.TIMESTEP)


def modulation_width(config: UNetConfig) -> int:
    """Columns of `modulation`."""
    return sum(2 * config.block_out_channels[block.level] for block in timestep_blocks(config))


def conditioning_ports(config: UNetConfig) -> StagePorts:
    """The conditioning graph. The decoder's takes `sample` for its size alone."""
    plain = ports_of(config)
    kept = {
        Stage.PRIOR: ("clip_text_pooled", "clip_text", "clip_img"),
        Stage.DECODER: ("sample", "clip_text_pooled", "effnet"),
    }[config.stage]
    inputs = tuple(port for port in plain.inputs if port.name in kept)
    modulation = Port(MODULATION, "float32", ("steps", modulation_width(config)))
    return stage_ports(
        (*inputs, Port(RATIOS, "float32", ("steps",))),
        (modulation, *_effnet_map(config), *attention_ports(config)),
        plain.ranges,
    )


def step_ports(config: UNetConfig) -> StagePorts:
    """The step graph; `modulation` is a row of the conditioning's, one for each sample."""
    plain = ports_of(config)
    inputs = (
        plain.inputs[0],
        Port(MODULATION, "float32", ("batch", modulation_width(config))),
        *_effnet_map(config),
        *attention_ports(config),
    )
    return stage_ports(inputs, plain.outputs, plain.ranges)


def _effnet_map(config: UNetConfig) -> tuple[Port, ...]:
    if config.stage is Stage.PRIOR:
        return ()
    patch = config.patch_size
    dims = ("batch", f"height/{patch}", f"width/{patch}", config.block_out_channels[0])
    return (Port(EFFNET_MAP, "float32", dims),)  # channels last: the sums of the first level are
