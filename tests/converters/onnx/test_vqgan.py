"""The VQGAN graph in onnxruntime against the PyTorch reference and against diffusers."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

from cascadekit.schemas.stages import VQGANConfig

TOLERANCE = 1e-5  # relative L2 of fp32 against fp32; about 3e-7 is found

CONFIGS = {
    "released form": VQGANConfig(bottleneck_blocks=3, embed_dim=24, num_vq_embeddings=8),
    "three levels": VQGANConfig(
        2,
        32,
        levels=3,
        latent_channels=5,
        out_channels=2,
        up_down_scale_factor=3,
        num_vq_embeddings=8,
        scale_factor=0.43,
    ),
    "one level": VQGANConfig(1, 16, levels=1, up_down_scale_factor=1, num_vq_embeddings=8),
}


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 5), (3, 8, 6), (1, 1, 9)], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_graph_follows_the_reference(
    export: Callable[..., Any], difference: Callable[..., float], config: VQGANConfig, sizes: tuple[int, int, int]
) -> None:
    graph = export(config)
    inputs = graph.inputs(**dict(zip(("batch", "height", "width"), sizes, strict=True)))
    assert difference(graph.run(inputs), graph.expected(inputs)) <= TOLERANCE


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_graph_follows_diffusers(
    export: Callable[..., Any], difference: Callable[..., float], config: VQGANConfig
) -> None:
    graph = export(config)
    theirs = PaellaVQModel(**asdict(config)).eval()
    theirs.load_state_dict(graph.tensors)
    inputs = graph.inputs(batch=2, height=5, width=7)
    with torch.no_grad():  # as in the last lines of diffusers' decoder pipeline
        decoded = theirs.decode(theirs.config.scale_factor * torch.from_numpy(inputs["latents"])).sample
    images = graph.run(inputs)
    assert difference(images, {"images": decoded.clamp(0, 1).numpy()}) <= TOLERANCE
    assert {0.0, 1.0} < set(np.unique(images["images"]))  # the clamp had something to do, and something was left


def test_half_precision_storage_is_computed_in_fp32(
    export: Callable[..., Any], difference: Callable[..., float]
) -> None:
    config = CONFIGS["released form"]
    graph = export(config, dtype=lambda name: torch.float16 if "up_blocks" in name else torch.bfloat16)
    inputs = graph.inputs(batch=1, height=4, width=4)
    assert difference(graph.run(inputs), graph.expected(inputs)) <= TOLERANCE
    assert difference(export(config).expected(inputs), graph.expected(inputs)) > 10 * TOLERANCE  # it did round
