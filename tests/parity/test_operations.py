"""The arithmetic counted from a config is what torch counts while the network runs."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cascadekit.parity.reference import build_reference
from cascadekit.schemas.errors import ExportError
from cascadekit.schemas.operations import multiply_adds
from cascadekit.schemas.ports import ports_of
from cascadekit.schemas.stages import (
    PRESETS,
    RES_TIMESTEP,
    EffnetEncoderConfig,
    NetworkConfig,
    Stage,
    TextEncoderConfig,
    UNetConfig,
    Variant,
    VQGANConfig,
    decoder_config,
    prior_config,
)

PRIOR = {"batch": 2, "height": 5, "width": 7, "tokens": 9, "images": 3}
DECODER = {"batch": 3, "height": 46, "width": 38, "effnet_height": 5, "effnet_width": 7}
UNEVEN = replace(
    prior_config((24, 40), (3, 5), (2, 3), text=6, pooled=10),
    down_blocks_repeat_mappers=(2, 1),
    up_blocks_repeat_mappers=(1, 3),
    kernel_size=5,
    clip_seq=3,
    timestep_conditioning_type=("sca",),
)


def config_of(stage: Stage, variant: Variant = Variant.TINY) -> NetworkConfig:
    return PRESETS[stage, variant]


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (config_of(Stage.PRIOR), PRIOR),
        (UNEVEN, PRIOR),
        (replace(UNEVEN, block_types_per_layer=(RES_TIMESTEP, RES_TIMESTEP)), PRIOR),
        (config_of(Stage.DECODER), DECODER),
        (decoder_config((8, 24, 16, 40), (0, 3, 2, 5), (1, 2, 1, 2), (1, 2, 3, 1), conditioning=12, pooled=7), DECODER),
        (config_of(Stage.VQGAN), {"batch": 2, "height": 6, "width": 11}),
        (VQGANConfig(bottleneck_blocks=1, embed_dim=32, levels=3), {"batch": 1, "height": 5, "width": 3}),
        (config_of(Stage.TEXT_ENCODER), {"batch": 3}),
        (TextEncoderConfig(12, 40, 3, 5, 7), {"batch": 1}),
    ],
)
def test_torch_counts_the_same(config: NetworkConfig, sizes: dict[str, int]) -> None:
    inputs = {}
    for port in ports_of(config).inputs:
        dims = [sizes[dim] if isinstance(dim, str) else dim for dim in port.dims]
        inputs[port.name] = torch.ones(dims, dtype=getattr(torch, port.dtype))
    network = build_reference(config)
    # As matrix products: torch has no count for its fused attention on CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(**inputs)
    assert 2 * multiply_adds(config, sizes) == counter.get_total_flops()


def test_the_prior_at_1024() -> None:
    """Stage C lite, guidance, 1024x1024: 1.03 billion parameters, most of them used at each of 2 x 576 pixels."""
    config = config_of(Stage.PRIOR, Variant.LITE)
    assert isinstance(config, UNetConfig)
    sizes = {"batch": 2, "height": 24, "width": 24, "tokens": 77, "images": 1}
    assert 0.9 < multiply_adds(config, sizes) / (2 * 576 * 1.03e9) < 1.1


def test_networks_that_are_not_exported_are_not_counted() -> None:
    with pytest.raises(ExportError, match="effnet_encoder"):
        multiply_adds(EffnetEncoderConfig(), {"batch": 1})
