"""Files are named by what they hold, from the header alone."""

from pathlib import Path

import pytest

from cascadekit import inspect
from cascadekit.schemas.layouts import Layout
from cascadekit.schemas.stages import Stage, Variant
from helpers.standins import write_stand_in

OFFICIAL = {
    "original_stage_a": (Stage.VQGAN, Layout.ORIGINAL, Variant.FULL),
    "original_stage_b": (Stage.DECODER, Layout.ORIGINAL, Variant.FULL),
    "original_stage_b_lite": (Stage.DECODER, Layout.ORIGINAL, Variant.LITE),
    "original_stage_c": (Stage.PRIOR, Layout.ORIGINAL, Variant.FULL),
    "original_stage_c_lite": (Stage.PRIOR, Layout.ORIGINAL, Variant.LITE),
    "diffusers_prior_lite": (Stage.PRIOR, Layout.DIFFUSERS, Variant.LITE),
    "diffusers_decoder": (Stage.DECODER, Layout.DIFFUSERS, Variant.FULL),
    "diffusers_vqgan": (Stage.VQGAN, Layout.DIFFUSERS, Variant.FULL),
    "diffusers_text_encoder": (Stage.TEXT_ENCODER, Layout.DIFFUSERS, Variant.FULL),
    "diffusers_image_encoder": (Stage.IMAGE_ENCODER, Layout.DIFFUSERS, Variant.FULL),
}


@pytest.mark.parametrize(("name", "expected"), OFFICIAL.items())
def test_official_files(
    catalog_folder: Path, tmp_path: Path, name: str, expected: tuple[Stage, Layout, Variant]
) -> None:
    path = tmp_path / "file.safetensors"
    content = write_stand_in(catalog_folder / f"{name}.json", path, holes=True)
    (component,) = inspect(path).components.values()
    assert (component.stage, component.layout, component.variant) == expected
    assert component.parameters == content["parameter_count"]
    assert set(component.dtypes) == {"F32"}
    assert not component.problems
