"""The image encoder graph in onnxruntime against the PyTorch reference and against transformers."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from cascadekit.schemas.config_json import to_json
from cascadekit.schemas.stages import ImageEncoderConfig

TOLERANCE = 1e-5  # relative L2 of fp32 against fp32; about 3e-7 is found

SMALL = ImageEncoderConfig(32, 80, 4, 3, 24, image_size=30, patch_size=10)
CONFIGS = {
    "quick_gelu": SMALL,
    "gelu, a rest of pixels": replace(SMALL, hidden_act="gelu", image_size=37, patch_size=8, layer_norm_eps=1e-3),
    "a layer of real width": ImageEncoderConfig(1024, 4096, 16, 1, 768),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_graph_follows_the_reference(
    export: Callable[..., Any], difference: Callable[..., float], config: ImageEncoderConfig, batch: int
) -> None:
    graph = export(config)
    inputs = graph.inputs(batch=batch)
    assert difference(graph.run(inputs), graph.expected(inputs)) <= TOLERANCE


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_graph_follows_transformers(
    export: Callable[..., Any], difference: Callable[..., float], config: ImageEncoderConfig, attention: str
) -> None:
    graph = export(config)
    values = CLIPVisionConfig.from_dict(to_json(config), attn_implementation=attention)
    theirs = CLIPVisionModelWithProjection(values).eval()
    theirs.load_state_dict(graph.tensors)
    inputs = graph.inputs(batch=2)
    with torch.no_grad():
        embeds = theirs(pixel_values=torch.from_numpy(inputs["pixel_values"])).image_embeds
    assert difference(graph.run(inputs), {"image_embeds": embeds.numpy()}) <= TOLERANCE


def test_half_precision_storage_is_computed_in_fp32(
    export: Callable[..., Any], difference: Callable[..., float]
) -> None:
    graph = export(SMALL, dtype=lambda _: torch.bfloat16)
    inputs = graph.inputs(batch=2)
    assert difference(graph.run(inputs), graph.expected(inputs)) <= TOLERANCE
    assert difference(export(SMALL).expected(inputs), graph.expected(inputs)) > 10 * TOLERANCE  # it did round
