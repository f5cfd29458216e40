"""Files are named by what they hold, from the header alone."""

import json
import struct
from pathlib import Path

import pytest

from cascadekit import inspect
from cascadekit.schemas.layouts import Layout
from cascadekit.schemas.stages import Stage, Variant

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
SIZES = {"F32": 4, "I64": 8}


def sparse_stand_in(catalog: Path, target: Path) -> dict[str, object]:
    """A file with the real names, shapes and size, all of it a hole: gigabytes that take no room."""
    content: dict[str, object] = json.loads(catalog.read_text())
    header, position = {}, 0
    tensors = content["tensors"]
    assert isinstance(tensors, dict)
    for name, spec in tensors.items():
        size = SIZES[spec["dtype"]]
        for side in spec["shape"]:
            size *= side
        header[name] = {**spec, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    with target.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)
    return content


@pytest.mark.parametrize(("name", "expected"), OFFICIAL.items())
def test_official_files(
    catalog_folder: Path, tmp_path: Path, name: str, expected: tuple[Stage, Layout, Variant]
) -> None:
    path = tmp_path / "file.safetensors"
    content = sparse_stand_in(catalog_folder / f"{name}.json", path)
    (component,) = inspect(path).components.values()
    assert (component.stage, component.layout, component.variant) == expected
    assert component.parameters == content["parameter_count"]
    assert set(component.dtypes) == {"F32"}
    assert not component.problems
