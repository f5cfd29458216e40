"""The previewer graph in onnxruntime against the PyTorch reference."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cascadekit.schemas.stages import PreviewerConfig

TOLERANCE = 1e-5  # relative L2 of fp32 against fp32; about 3e-7 is found

CONFIGS = {"released": PreviewerConfig(), "small": PreviewerConfig(c_in=4, c_hidden=64)}


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 5), (3, 6, 4)], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_graph_follows_the_reference(
    export: Callable[..., Any], difference: Callable[..., float], config: PreviewerConfig, sizes: tuple[int, int, int]
) -> None:
    graph = export(config)
    inputs = graph.inputs(**dict(zip(("batch", "height", "width"), sizes, strict=True)))
    images = graph.run(inputs)
    assert difference(images, graph.expected(inputs)) <= TOLERANCE
    assert images["images"].shape == (sizes[0], config.c_out, 8 * sizes[1], 8 * sizes[2])
    inside = (images["images"] > 0) & (images["images"] < 1)
    assert 0.1 < np.mean(inside) < 0.95  # the clamp had something to do, and something was left


def test_half_precision_storage_is_computed_in_fp32(
    export: Callable[..., Any], difference: Callable[..., float]
) -> None:
    config = CONFIGS["released"]
    graph = export(config, dtype=lambda _: torch.float16)
    inputs = graph.inputs(batch=1, height=4, width=4)
    assert difference(graph.run(inputs), graph.expected(inputs)) <= TOLERANCE
    assert difference(export(config).expected(inputs), graph.expected(inputs)) > 10 * TOLERANCE  # it did round
