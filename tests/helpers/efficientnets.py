"""EfficientNets with the layers of the released ones, a hundred times smaller: every kind of block, first and repeated.

Tests of parity/reference/ and converters/onnx/ have the released sizes.
"""

import pytest

from cascadekit.converters.onnx import controlnet as controlnet_graph
from cascadekit.runtime.engines.pytorch.networks import controlnet as controlnet_network
from cascadekit.schemas import tensors
from cascadekit.schemas.stages import PROJ_BLOCKS_ENDS, ControlNetConfig, EffnetEncoderConfig

WIDTHS, BLOCKS = (8, 8, 12, 16, 24, 32, 40, 64), (1, 2, 2, 2, 2, 3)


def narrow_effnet(c_latent: int = 16) -> EffnetEncoderConfig:
    return EffnetEncoderConfig(c_latent, WIDTHS, BLOCKS)


def narrow_controlnet(c_in: int, proj_blocks: tuple[int, ...] = PROJ_BLOCKS_ENDS, c_proj: int = 64) -> ControlNetConfig:
    """The ControlNet for Canny edges (1 channel) or for inpainting (4)."""
    return ControlNetConfig(c_in, proj_blocks, None, c_proj, WIDTHS, BLOCKS)


def narrow_large_backbone(patch: pytest.MonkeyPatch) -> None:
    """Make the backbone of the ControlNet for super-resolution narrow; its released widths are no part of a config."""
    for module in (tensors, controlnet_graph, controlnet_network):
        patch.setattr(module, "LARGE_ENTRANCE", 96)
        patch.setattr(module, "LARGE_WIDTH", 32)
