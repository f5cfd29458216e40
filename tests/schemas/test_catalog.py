"""The rules, configs and shape formulas against every published layout, as listed in the catalog."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cascadekit.schemas.config_json import from_json, to_json
from cascadekit.schemas.infer_config import infer_config
from cascadekit.schemas.layouts import ORIGINAL_TO_DIFFUSERS, Layout, foreign_name, layout_of, stage_of
from cascadekit.schemas.stages import Stage, Variant, variant_of
from cascadekit.schemas.tensors import Shape, expected_tensors, is_counter
from cascadekit.storage.safetensors_plan import TensorPlan
from cascadekit.storage.safetensors_writer import encode_header

PAIRS = [
    ("original_stage_a", "diffusers_vqgan", Stage.VQGAN, Variant.FULL),
    ("original_stage_b", "diffusers_decoder", Stage.DECODER, Variant.FULL),
    ("original_stage_b_lite", "diffusers_decoder_lite", Stage.DECODER, Variant.LITE),
    ("original_stage_c", "diffusers_prior", Stage.PRIOR, Variant.FULL),
    ("original_stage_c_lite", "diffusers_prior_lite", Stage.PRIOR, Variant.LITE),
]
ENCODERS = [("diffusers_text_encoder", Stage.TEXT_ENCODER), ("diffusers_image_encoder", Stage.IMAGE_ENCODER)]
OURS = [  # neither diffusers nor transformers has a class for these
    ("original_controlnet_canny", Stage.CONTROLNET_CANNY, "CascadeControlNet"),
    ("original_controlnet_identity", Stage.CONTROLNET_IDENTITY, "CascadeControlNet"),
    ("original_controlnet_inpainting", Stage.CONTROLNET_INPAINTING, "CascadeControlNet"),
    ("original_controlnet_super_resolution", Stage.CONTROLNET_SUPER_RESOLUTION, "CascadeControlNet"),
    ("original_effnet_encoder", Stage.EFFNET_ENCODER, "CascadeEffnetEncoder"),
    ("original_previewer", Stage.PREVIEWER, "CascadePreviewer"),
]
COMFYUI = [("comfyui_stage_b", "diffusers_decoder"), ("comfyui_stage_c", "diffusers_prior")]


def load(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Shape]]:
    content = json.loads((folder / f"{name}.json").read_text())
    return content, {key: tuple(spec["shape"]) for key, spec in content["tensors"].items()}


def test_every_catalog_file_is_tested(catalog_folder: Path) -> None:
    tested = {name for pair in PAIRS for name in pair[:2]}
    tested |= {name for name, _ in ENCODERS} | {name for name, _, _ in OURS} | {name for name, _ in COMFYUI}
    assert tested == {path.stem for path in catalog_folder.glob("*.json")}


@pytest.mark.parametrize(("original", "diffusers", "stage", "variant"), PAIRS)
class TestStages:
    def test_rules_both_ways(
        self, catalog_folder: Path, original: str, diffusers: str, stage: Stage, variant: Variant
    ) -> None:
        _, theirs = load(catalog_folder, original)
        _, wanted = load(catalog_folder, diffusers)
        rules = ORIGINAL_TO_DIFFUSERS[stage]
        assert {name: made.shape for name, made in rules.apply(theirs).items()} == wanted
        assert {name: made.shape for name, made in rules.inverse.apply(wanted).items()} == theirs

    def test_recognised(
        self, catalog_folder: Path, original: str, diffusers: str, stage: Stage, variant: Variant
    ) -> None:
        _, theirs = load(catalog_folder, original)
        _, wanted = load(catalog_folder, diffusers)
        assert stage_of(theirs) is stage_of(wanted) is stage
        assert layout_of(stage, theirs) is Layout.ORIGINAL
        assert layout_of(stage, wanted) is Layout.DIFFUSERS

    def test_config_read_off_shapes_is_the_published_one(
        self, catalog_folder: Path, original: str, diffusers: str, stage: Stage, variant: Variant
    ) -> None:
        content, shapes = load(catalog_folder, diffusers)
        config = infer_config(stage, shapes)
        assert variant_of(config) is variant
        written = json.loads(json.dumps(to_json(config)))
        assert written.pop("_diffusers_version")
        assert written == content["config"]
        assert from_json(stage, content["config"]) == config
        assert expected_tensors(config) == shapes


@pytest.mark.parametrize(("name", "stage"), ENCODERS)
def test_encoders(catalog_folder: Path, name: str, stage: Stage) -> None:
    content, shapes = load(catalog_folder, name)
    assert stage_of(shapes) is stage
    rules = ORIGINAL_TO_DIFFUSERS[stage]
    assert {key: made.shape for key, made in rules.apply(shapes).items()} == shapes
    config = infer_config(stage, shapes)
    assert expected_tensors(config) == shapes
    assert json.loads(json.dumps(to_json(config))) == content["config"]
    assert from_json(stage, content["config"]) == config


@pytest.mark.parametrize(("name", "stage", "class_name"), OURS)
def test_components_with_one_spelling(catalog_folder: Path, name: str, stage: Stage, class_name: str) -> None:
    """No rule may touch their names; their config.json holds the arguments of Stability's class and our class."""
    content, shapes = load(catalog_folder, name)
    assert stage_of(shapes) is stage
    for rules in ORIGINAL_TO_DIFFUSERS.values():
        assert {key: made.shape for key, made in rules.apply(shapes).items()} == shapes
        assert {key: made.shape for key, made in rules.inverse.apply(shapes).items()} == shapes
    config = infer_config(stage, shapes)
    assert (config.stage, variant_of(config)) == (stage, Variant.FULL)
    assert expected_tensors(config) == shapes
    published = content["config"]
    published.pop("backbone", None)  # words of the catalog; the effnet encoder has one backbone only
    written = json.loads(json.dumps(to_json(config)))
    assert written == {"_class_name": class_name, **published}
    assert from_json(stage, written) == config


def test_step_counters_are_the_integers(catalog_folder: Path) -> None:
    for name in ("original_stage_a", *(name for name, _, _ in OURS)):
        content, _ = load(catalog_folder, name)
        for key, spec in content["tensors"].items():
            assert is_counter(key) == (spec["dtype"] == "I64"), key


@pytest.mark.parametrize(
    ("name", "convolution"),
    [
        ("original_controlnet_canny", ("backbone.0.0.weight", (24, 3, 3, 3))),  # as for qr codes, never released
        ("original_controlnet_identity", ("backbone.0.weight", (64, 16, 3, 3))),
        ("original_controlnet_super_resolution", ("backbone.0.weight", (16384, 512, 1, 1))),
    ],
)
def test_controlnets_of_other_kinds(catalog_folder: Path, name: str, convolution: tuple[str, Shape]) -> None:
    _, shapes = load(catalog_folder, name)
    shapes.update([convolution])
    assert stage_of(shapes) is None
    assert "a ControlNet of no kind released" in (foreign_name(shapes) or "")


@pytest.mark.parametrize(("name", "diffusers"), COMFYUI)
def test_unet_of_comfyui_files(catalog_folder: Path, name: str, diffusers: str) -> None:
    """Inside its prefix an all-in-one file spells the UNet as the original does."""
    _, shapes = load(catalog_folder, name)
    _, wanted = load(catalog_folder, diffusers)
    prefix = "model.diffusion_model."
    unet = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    stage = stage_of(unet)
    assert stage is not None
    assert {key: made.shape for key, made in ORIGINAL_TO_DIFFUSERS[stage].apply(unet).items()} == wanted


@pytest.mark.parametrize("name", ["original_previewer", "diffusers_prior_lite"])
def test_an_entry_can_be_made_again_from_a_file(catalog_folder: Path, tmp_path: Path, name: str) -> None:
    """tests/data/make_catalog.py on a file with the header of the published one, whose values are a hole."""
    content, shapes = load(catalog_folder, name)
    plans = {key: TensorPlan(content["tensors"][key]["dtype"], shape, ()) for key, shape in shapes.items()}
    header = encode_header(plans, {})
    (tmp_path / "x.safetensors").write_bytes(header)
    os.truncate(tmp_path / "x.safetensors", len(header) + sum(plan.nbytes for plan in plans.values()))
    (tmp_path / "config.json").write_text(json.dumps(content["config"]))
    options = [f"--{key}={content[key]}" for key in ("component", "layout", "variant")]
    script = catalog_folder.parent / "make_catalog.py"
    command = [sys.executable, script, tmp_path / "x.safetensors", *options, "--config", tmp_path / "config.json"]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(made) == content
