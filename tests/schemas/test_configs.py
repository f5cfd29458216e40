"""Configs from JSON: what is taken, what is refused; configs of fine-tunes read off their shapes."""

import dataclasses
from typing import Any

import pytest

from cascadekit.schemas.config_json import from_json, to_json
from cascadekit.schemas.errors import CheckpointError, LayoutError
from cascadekit.schemas.infer_config import infer_config
from cascadekit.schemas.manifest import parse_manifest
from cascadekit.schemas.stages import (
    PRESETS,
    ControlNetConfig,
    EffnetEncoderConfig,
    NetworkConfig,
    PreviewerConfig,
    Stage,
    Variant,
    VQGANConfig,
    same_network,
    variant_of,
)
from cascadekit.schemas.tensors import expected_tensors

PRIOR = PRESETS[Stage.PRIOR, Variant.LITE]
DECODER = PRESETS[Stage.DECODER, Variant.LITE]
CANNY = PRESETS[Stage.CONTROLNET_CANNY, Variant.FULL]

ODD_UNETS = [
    dataclasses.replace(PRIOR, block_out_channels=(128, 320), num_attention_heads=(2, 5), conditioning_dim=96),
    dataclasses.replace(PRIOR, down_num_layers_per_block=(3, 2), up_num_layers_per_block=(1, 4)),
    dataclasses.replace(PRIOR, down_blocks_repeat_mappers=(2, 1), up_blocks_repeat_mappers=(1, 3), clip_seq=2),
    dataclasses.replace(DECODER, up_blocks_repeat_mappers=(4, 3, 2, 1), effnet_in_channels=24),
    dataclasses.replace(PRIOR, timestep_conditioning_type=("sca",), clip_text_in_channels=99, kernel_size=5),
]

ODD_OTHERS = [
    VQGANConfig(3, 96, num_vq_embeddings=10),
    EffnetEncoderConfig(c_latent=24),
    EffnetEncoderConfig(backbone_widths=(4, 6, 8, 12, 16, 20, 24, 40), backbone_blocks=(1, 2, 1, 3, 1, 2)),
    PreviewerConfig(c_in=4, c_hidden=40, c_out=1),
    ControlNetConfig(1, tuple(range(64)), c_proj=1536),
    ControlNetConfig(4, tuple(range(64)), backbone_widths=(4, 4, 8, 12, 16, 20, 24, 40)),
]


@pytest.mark.parametrize("config", [*PRESETS.values(), *ODD_UNETS, *ODD_OTHERS])
def test_shapes_tell_the_config(config: NetworkConfig) -> None:
    assert same_network(infer_config(config.stage, expected_tensors(config)), config)


@pytest.mark.parametrize(("key", "preset"), PRESETS.items())
def test_presets_are_known_by_name_and_survive_json(key: tuple[Stage, Variant], preset: NetworkConfig) -> None:
    assert (preset.stage, variant_of(preset)) == key
    assert from_json(preset.stage, to_json(preset)) == preset


def test_a_fine_tune_is_custom() -> None:
    assert variant_of(ODD_UNETS[0]) is Variant.CUSTOM


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "expected class StableCascadeUNet, found UNet2DConditionModel"),
        ({"switch_level": [True]}, "switch_level"),
        ({"self_attn": False}, "self_attn"),
        ({"block_out_channels": [64]}, "must have 1 entries"),
        ({"block_types_per_layer": [["Conv"], ["Conv"]]}, "should be 'SDCascadeResBlock'"),
        ({"down_num_layers_per_block": [10**9, 1]}, "expected 1 to 1000, found 1000000000"),
        ({"num_attention_heads": [5, 24]}, "num_attention_heads do not divide"),
        ({"dropout": [float("nan"), 0.1]}, "expected a number, found nan"),
        ({"patch_size": None}, "patch_size: Input should be a valid integer"),
        ({"effnet_in_channels": 16}, "describes a decoder"),
    ],
)
def test_refused_configs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        from_json(Stage.PRIOR, {**to_json(PRIOR), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "CascadePreviewer"}, "expected class CascadeControlNet, found CascadePreviewer"),
        ({"c_in": 4}, "describes a controlnet/inpainting"),
        ({"c_in": 3}, "3 input channels .* none of the released"),
        ({"c_in": {}}, "c_in: Input should be a valid integer"),
        ({"bottleneck_mode": "huge"}, "bottleneck_mode: Input should be 'large' or 'simple'"),
        ({"proj_blocks": 8}, "config of the controlnet/canny"),
        ({"proj_blocks": []}, "proj_blocks must be the numbers of different blocks"),
        ({"proj_blocks": [0, 4, 4]}, "proj_blocks must be the numbers of different blocks"),
        ({"proj_blocks": [0, "four"]}, r"proj_blocks\.1: Input should be a valid integer"),
    ],
)
def test_refused_controlnets(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        from_json(Stage.CONTROLNET_CANNY, {**to_json(CANNY), **change})


def test_blocks_of_an_unreleased_number_of_projections_come_from_the_json_alone() -> None:
    config = dataclasses.replace(CANNY, proj_blocks=(3, 1, 2))
    with pytest.raises(LayoutError, match=r"has 3 projections.*\(proj_blocks\) is not in the file"):
        infer_config(config.stage, expected_tensors(config))
    assert from_json(config.stage, to_json(config)) == config


def test_missing_fields_are_named() -> None:
    values = to_json(PRIOR)
    del values["block_out_channels"], values["patch_size"]
    with pytest.raises(LayoutError, match="missing patch_size, block_out_channels"):
        from_json(Stage.PRIOR, values)


@pytest.mark.parametrize("lost", ["down_blocks.0.0.depthwise.weight", "clip_txt_pooled_mapper.weight"])
def test_a_tensor_the_config_is_read_from_is_missing(lost: str) -> None:
    shapes = expected_tensors(PRIOR)
    del shapes[lost]
    with pytest.raises(LayoutError, match=lost):
        infer_config(Stage.PRIOR, shapes)


def test_manifests_that_lead_out_of_the_bundle_or_are_damaged() -> None:
    with pytest.raises(CheckpointError, match=r"cascade\.json: not a manifest.*stages"):
        parse_manifest('{"created_by": "x"}', "cascade.json")
    with pytest.raises(CheckpointError, match="leads out of the bundle"):
        parse_manifest(
            '{"created_by": "x", "default_size": [8, 8], "vqgan_scale": null, "stages": {}, "tokenizer": "../../etc"}',
            "cascade.json",
        )


@pytest.mark.parametrize("name", ["backbone_widths", "backbone_blocks"])
def test_a_backbone_of_another_number_of_rows_is_refused(name: str) -> None:
    config = to_json(PRESETS[Stage.EFFNET_ENCODER, Variant.ICONS])
    assert from_json(Stage.EFFNET_ENCODER, config) == PRESETS[Stage.EFFNET_ENCODER, Variant.ICONS]
    with pytest.raises(LayoutError, match=f"{name} .*: expected [68] numbers"):
        from_json(Stage.EFFNET_ENCODER, {**config, name: [1, 2]})
