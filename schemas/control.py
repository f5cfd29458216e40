"""Ports of the prior for the residuals of ControlNets: one for each residual block that takes a residual."""

from collections.abc import Sequence

from .errors import ExportError
from .ports import Port, SizeRange, control_port
from .stages import Block, UNetConfig
from .unet_blocks import blocks_of


def is_control(port: str) -> bool:
    """True for a port that takes a ControlNet's residual."""
    return port.startswith("control.")


def controlled_blocks(config: UNetConfig, numbers: Sequence[int]) -> dict[str, str]:
    """Return the port of each controlled block, by the block's name.

    Raises ExportError for numbers without a residual block, and for networks that run a level more than once: the
    residual would have no definite place."""
    residual = [block.name for block in blocks_of(config) if block.kind is Block.RES]
    wrong = [number for number in numbers if not 0 <= number < len(residual)]
    if wrong:
        raise ExportError(
            f"{config.stage}: has {len(residual)} residual blocks, none for ControlNet residuals at "
            f"{', '.join(map(str, wrong))}; ControlNets are made for the full prior"
        )
    if numbers and any(n > 1 for n in (*config.down_blocks_repeat_mappers, *config.up_blocks_repeat_mappers)):
        raise ExportError(f"{config.stage}: takes no ControlNet, as it runs its levels more than once")
    return {residual[number]: control_port(number) for number in numbers}


def control_ports(config: UNetConfig, numbers: Sequence[int]) -> tuple[Port, ...]:
    """Return the ports, (B, c, h, w) float32. Each has its own size, at least 1x1; zeros have no effect."""
    levels = {block.name: block.level for block in blocks_of(config)}
    return tuple(
        Port(port, "float32", ("batch", config.block_out_channels[levels[name]], f"{port}.height", f"{port}.width"))
        for name, port in controlled_blocks(config, numbers).items()
    )


def control_ranges(ports: Sequence[Port]) -> dict[str, SizeRange]:
    """The ranges of the heights and widths of ControlNet ports."""
    return {dim: SizeRange() for port in ports for dim in port.dims[2:] if isinstance(dim, str)}
