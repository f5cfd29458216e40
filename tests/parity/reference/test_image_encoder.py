"""The image encoder against CLIPVisionModelWithProjection of transformers with the same weights."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers

from cascadekit.parity.reference import load_reference
from cascadekit.schemas.config_json import to_json
from cascadekit.schemas.errors import LayoutError
from cascadekit.schemas.stages import ImageEncoderConfig
from cascadekit.schemas.tensors import expected_tensors

SMALL = ImageEncoderConfig(48, 96, 3, 4, 20, image_size=42, patch_size=14)
CONFIGS = {
    "small": SMALL,
    "gelu": replace(SMALL, hidden_act="gelu", projection_dim=48),
    "a rest of pixels": replace(SMALL, image_size=37, patch_size=8, num_hidden_layers=2, num_channels=2),
    "epsilon": replace(SMALL, num_attention_heads=2, num_hidden_layers=2, layer_norm_eps=0.1),
}
REAL_WIDTH = ImageEncoderConfig(1024, 4096, 16, 1, 768)

Oracle = Callable[[ImageEncoderConfig], Any]


@pytest.fixture(scope="module")
def oracle(randomised: Callable[..., Any]) -> Oracle:
    """A function for the network of transformers with random weights; made once, copied per use."""

    @cache
    def build(config: ImageEncoderConfig) -> Any:
        values = transformers.CLIPVisionConfig.from_dict(to_json(config))
        return randomised(transformers.CLIPVisionModelWithProjection(values))

    return lambda config: copy.deepcopy(build(config))


def pixels(config: ImageEncoderConfig, batch: int = 2) -> Any:
    shape = (batch, config.num_channels, config.image_size, config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(batch))


def embed(theirs: Any, values: Any) -> Any:
    with torch.no_grad():
        return theirs(pixel_values=values).image_embeds


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_transformers_has_the_expected_tensors(oracle: Oracle, config: ImageEncoderConfig) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in oracle(config).state_dict().items()}
    assert shapes == expected_tensors(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_embeds(oracle: Oracle, difference: Callable[..., float], config: ImageEncoderConfig, dtype: Any) -> None:
    theirs = oracle(config).to(dtype)
    ours = load_reference(config, theirs.state_dict(), dtype)
    for batch in (1, 3):
        values = pixels(config, batch).to(dtype)
        with torch.no_grad():
            found = ours(pixel_values=values)
        assert list(found) == ["image_embeds"]
        # Bit for bit; in double the two ways to the scale of attention, 1/sqrt(d) and d**-0.5, may be an ulp apart.
        assert difference(found["image_embeds"], embed(theirs, values)) <= (1e-14 if dtype == torch.float64 else 0)


def test_a_layer_of_real_width(oracle: Oracle, difference: Callable[..., float]) -> None:
    theirs = oracle(REAL_WIDTH)
    values = pixels(REAL_WIDTH, batch=2)
    with torch.no_grad():
        found = load_reference(REAL_WIDTH, theirs.state_dict())(pixel_values=values)["image_embeds"]
    assert difference(found, embed(theirs, values)) == 0


@pytest.mark.parametrize(
    "name",
    [
        "vision_model.embeddings.class_embedding",
        "vision_model.embeddings.patch_embedding.weight",
        "vision_model.embeddings.position_embedding.weight",
        "vision_model.pre_layrnorm.bias",
        "vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "vision_model.encoder.layers.3.mlp.fc1.bias",
        "vision_model.post_layernorm.weight",
        "visual_projection.weight",
    ],
)
def test_one_wrong_value_is_seen(oracle: Oracle, difference: Callable[..., float], name: str) -> None:
    theirs = oracle(SMALL)
    weights = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}
    weights[name].view(-1)[-1] += 0.3
    values = pixels(SMALL)
    with torch.no_grad():
        found = load_reference(SMALL, weights)(pixel_values=values)["image_embeds"]
    assert difference(found, embed(theirs, values)) > 1e-4


def test_unknown_activation_is_an_error() -> None:
    with pytest.raises(LayoutError, match="image_encoder: hidden_act must be gelu or quick_gelu, found relu"):
        load_reference(replace(SMALL, hidden_act="relu"), {})
