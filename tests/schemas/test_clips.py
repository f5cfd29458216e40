"""Configs of CLIP models as transformers reads them, and which towers fit the cascade."""

from dataclasses import asdict
from typing import Any

import pytest

from cascadekit.schemas.clips import misfit
from cascadekit.schemas.config_json import from_json
from cascadekit.schemas.errors import LayoutError
from cascadekit.schemas.stages import PRESETS, ImageEncoderConfig, Stage, TextEncoderConfig, Variant

transformers = pytest.importorskip("transformers")

THEIRS = {Stage.TEXT_ENCODER: transformers.CLIPTextConfig, Stage.IMAGE_ENCODER: transformers.CLIPVisionConfig}
KEYS = {Stage.TEXT_ENCODER: "text_config", Stage.IMAGE_ENCODER: "vision_config"}
PRIOR, DECODER = PRESETS[Stage.PRIOR, Variant.FULL], PRESETS[Stage.DECODER, Variant.FULL]


def assert_as(config: Any, theirs: Any) -> None:
    for name, value in asdict(config).items():
        assert getattr(theirs, name) == value, name


@pytest.mark.parametrize("stage", THEIRS)
def test_keys_that_are_left_out_are_their_defaults(stage: Stage) -> None:
    theirs = THEIRS[stage]()
    assert_as(from_json(stage, {"model_type": theirs.model_type}), theirs)


WHOLE: dict[str, dict[str, Any]] = {
    "both widths stated": {"text_config": {"hidden_size": 64}, "vision_config": {"hidden_size": 48}},
    "written twice": {
        "text_config": {"hidden_size": 99, "num_hidden_layers": 7, "hidden_act": "gelu"},
        "text_config_dict": {"hidden_size": 64},
        "vision_config": {"hidden_size": 99, "patch_size": 3},
        "vision_config_dict": {"hidden_size": 48, "image_size": 56},
    },
    "null": {"text_config": None, "text_config_dict": None, "vision_config": None},
}


@pytest.mark.parametrize("stage", THEIRS)
@pytest.mark.parametrize("name", WHOLE)
def test_towers_of_a_whole_clip(stage: Stage, name: str) -> None:
    theirs = transformers.CLIPConfig(**{key: dict(value) if value else value for key, value in WHOLE[name].items()})
    found = from_json(stage, {"model_type": "clip", **WHOLE[name]})
    assert_as(found, getattr(theirs, KEYS[stage]))


def test_the_tensor_decides_between_two_widths_of_the_projection() -> None:
    """LAION's configs state 512 in the tower, which is the default, and the true width outside."""
    values = {"model_type": "clip", "projection_dim": 1024, "text_config": {"projection_dim": 512}}
    for width in (512, 1024):
        config = from_json(Stage.TEXT_ENCODER, values, {"text_projection.weight": (width, 512)})
        assert isinstance(config, TextEncoderConfig)
        assert config.projection_dim == width


def test_hostile_towers() -> None:
    for wrong in ({"text_config": 3}, {"text_config": [1]}, {"text_config_dict": "x"}):
        with pytest.raises(LayoutError, match="expected text_config to be an object"):
            from_json(Stage.TEXT_ENCODER, {"model_type": "clip", **wrong})


TOWERS = {
    "the releases' text": (PRESETS[Stage.TEXT_ENCODER, Variant.FULL], None),
    "the releases' image": (PRESETS[Stage.IMAGE_ENCODER, Variant.FULL], None),
    "the text of ViT-L": (TextEncoderConfig(768, 3072, 12, 12, 768), "CLIP ViT-L/14, 768 wide.*1280, found 768"),
    "the image of ViT-bigG": (
        ImageEncoderConfig(1664, 8192, 16, 48, 1280),
        "image tower of CLIP ViT-bigG/14, 1664 wide.*a projection to 768, found 1280.*openai/clip-vit-large-patch14",
    ),
    "none known": (TextEncoderConfig(1000, 3072, 10, 12, 1280), "a CLIP model, 1000 wide"),
}


@pytest.mark.parametrize("name", TOWERS)
def test_towers_that_do_not_fit(name: str) -> None:
    import re

    config, reason = TOWERS[name]
    found = misfit(config, [DECODER, PRIOR])
    assert found is None if reason is None else re.search(reason, found or "")
