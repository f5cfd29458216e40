"""Configs of priors and decoders that vary all that a config can vary, and sizes to run them at."""

from dataclasses import replace
from typing import Any

import numpy as np

from cascadekit.schemas.stages import (
    RES_TIMESTEP,
    RES_TIMESTEP_ATTENTION,
    Block,
    Stage,
    decoder_config,
    prior_config,
)

PRIOR = replace(prior_config((128, 64), (2, 1), (2, 3), text=24, pooled=20), clip_image_in_channels=12, out_channels=6)
# All that a config can vary: three levels with strided convolutions, a level that does not begin with the block that
# takes the skip, mappers on both ways, one condition, another kernel, patch and number of tokens.
ODD_PRIOR = replace(
    prior_config((32, 64, 128), (0, 1, 2), (1, 1, 2), text=24, pooled=20),
    block_types_per_layer=((Block.TIMESTEP, Block.RES), RES_TIMESTEP_ATTENTION, (Block.RES, Block.ATTENTION)),
    down_blocks_repeat_mappers=(2, 1, 3),
    up_blocks_repeat_mappers=(2, 3, 1),
    switch_level=None,
    clip_seq=3,
    timestep_conditioning_type=("crp",),
    timestep_ratio_embedding_dim=32,
    kernel_size=5,
    dropout=(0.1, 0.1, 0.1),
    patch_size=2,
    conditioning_dim=40,
)
DECODER = decoder_config((16, 24, 64, 128), (0, 0, 1, 2), (1, 3, 2, 1), (3, 1, 2, 2), conditioning=48, pooled=20)
ODD_DECODER = replace(
    decoder_config((8, 32, 64, 64), (0, -1, 1, 1), (2, 1, 1, 1), (2, 2, 1, 3), conditioning=40, pooled=20),
    down_blocks_repeat_mappers=(1, 2, 1, 2),
    block_types_per_layer=(RES_TIMESTEP, RES_TIMESTEP, RES_TIMESTEP, RES_TIMESTEP_ATTENTION),
    effnet_in_channels=7,
    timestep_conditioning_type=(),
)

PRIOR_SIZES = [  # batch, height, width, tokens, images
    (1, 1, 1, 1, 1),
    (2, 5, 7, 77, 1),
    (3, 6, 6, 11, 2),
    (1, 12, 9, 77, 3),
    (2, 1, 8, 85, 2),
    (1, 2, 3, 77, 1),
    (4, 4, 4, 5, 1),
    (2, 13, 8, 77, 1),
    (1, 17, 24, 2, 4),
    (5, 3, 1, 77, 2),
    (2, 24, 24, 77, 1),
    (1, 30, 20, 40, 1),
]
ODD_PRIOR_SIZES = [(1, 8, 8, 1, 1), (2, 14, 10, 77, 1), (3, 22, 12, 11, 2), (1, 18, 26, 9, 3)]
DECODER_SIZES = [  # batch, height, width, effnet_height, effnet_width
    (1, 16, 16, 6, 6),
    (2, 18, 26, 1, 1),
    (3, 34, 22, 5, 2),
    (1, 62, 46, 24, 23),
    (2, 32, 48, 40, 30),
    (1, 16, 18, 1, 7),
    (2, 20, 16, 3, 3),
    (1, 64, 64, 24, 24),
    (4, 16, 24, 5, 4),
    (1, 42, 30, 2, 9),
    (2, 50, 18, 12, 5),
    (3, 26, 28, 6, 6),
]
STAGE_DIMS = {
    Stage.PRIOR: ("batch", "height", "width", "tokens", "images"),
    Stage.DECODER: ("batch", "height", "width", "effnet_height", "effnet_width"),
}


def inputs_of(graph: Any, sizes: tuple[int, ...]) -> dict[str, np.ndarray]:
    values: dict[str, np.ndarray] = graph.inputs(**dict(zip(STAGE_DIMS[graph.config.stage], sizes, strict=True)))
    return values
