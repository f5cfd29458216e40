"""The exponents of a network's streams: a stream with exponent k holds 2^-k of its values.

Every norm of prior and decoder is affine-free: norm(2^-k x) equals norm(x) when epsilon is multiplied by 4^-k. So the
network stays the same function, exactly, when every layer that writes to a stream writes 2^-k of its output.
fp16 ends at 65504, and the values of the prior stay below that only with exponents.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ...schemas.stages import UNetConfig
from ...schemas.unet_blocks import stream_of

NORM_EPS = 1e-6  # of the LayerNorms and of the response normalisation's quotient


@dataclass(frozen=True)
class Streams:
    """The exponent of each stream of a network; 0 where none is given."""

    config: UNetConfig
    exponents: Mapping[str, int]

    def of(self, blocks: str) -> int:
        """The exponent of the stream that the blocks called `blocks`, such as "up_blocks.1", write to."""
        return self.exponents.get(stream_of(self.config, blocks), 0)

    def of_block(self, name: str) -> int:
        """The same for one block, such as "up_blocks.1.5"."""
        return self.of(name.rpartition(".")[0])
