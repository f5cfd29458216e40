"""Biases of graphs for ONNX Runtime that an export computes: those with the beta of a response norm in them.

The last Linear of a residual block multiplies what the norm gives, gain * x + beta. Its weight times beta, plus its
bias, is a constant. A runtime that folds it casts and multiplies every such weight on the host, each time it loads the
graph: 2.1 GB of the full prior.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from .stages import Block, NetworkConfig, UNetConfig
from .tensors import Shape
from .unet_blocks import blocks_of

BIASES_NAME = "biases.safetensors"  # their file, beside the weights of a stage


@dataclass(frozen=True)
class FoldedBias:
    """weight times beta, plus bias: the tensor `name` of `width` values, and the tensors that it is computed from."""

    name: str
    width: int
    weight: str
    bias: str
    beta: str

    @property
    def linear(self) -> str:
        """The module that adds the bias."""
        return self.weight.removesuffix(".weight")


def folded_name(linear: str) -> str:
    return f"{linear}.bias_with_beta"


def folded_biases(config: NetworkConfig) -> Iterator[FoldedBias]:
    """Yield the biases of a network; only prior and decoder have some."""
    if isinstance(config, UNetConfig):
        for block in blocks_of(config):
            if block.kind is Block.RES:
                linear, width = f"{block.name}.channelwise.4", config.block_out_channels[block.level]
                beta = f"{block.name}.channelwise.2.beta"
                yield FoldedBias(folded_name(linear), width, f"{linear}.weight", f"{linear}.bias", beta)


def folded_shapes(config: NetworkConfig) -> dict[str, Shape]:
    """The shape of each tensor in the file of the biases."""
    return {folded.name: (folded.width,) for folded in folded_biases(config)}
