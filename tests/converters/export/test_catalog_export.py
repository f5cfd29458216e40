"""Every component of the catalog exports from a file of its real names, shapes and size."""

from pathlib import Path

import pytest

from cascadekit import export
from cascadekit.converters.export.validate import validate
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import open_bundle
from helpers.standins import write_stand_in

ORIGINAL = {
    "stage_a": Stage.VQGAN,
    "stage_b": Stage.DECODER,
    "stage_b_lite": Stage.DECODER,
    "stage_c": Stage.PRIOR,
    "stage_c_lite": Stage.PRIOR,
    "effnet_encoder": Stage.EFFNET_ENCODER,
    "previewer": Stage.PREVIEWER,
    "controlnet_canny": Stage.CONTROLNET_CANNY,
    "controlnet_inpainting": Stage.CONTROLNET_INPAINTING,
    "controlnet_super_resolution": Stage.CONTROLNET_SUPER_RESOLUTION,
    "controlnet_identity": Stage.CONTROLNET_IDENTITY,
}
DIFFUSERS = {
    "prior": Stage.PRIOR,
    "prior_lite": Stage.PRIOR,
    "decoder": Stage.DECODER,
    "decoder_lite": Stage.DECODER,
    "vqgan": Stage.VQGAN,
    "text_encoder": Stage.TEXT_ENCODER,
    "image_encoder": Stage.IMAGE_ENCODER,
}
CASES = [
    *((f"original_{name}", stage) for name, stage in ORIGINAL.items()),
    *((f"diffusers_{name}", stage) for name, stage in DIFFUSERS.items()),
    ("comfyui_stage_c", Stage.PRIOR),
    ("comfyui_stage_b", Stage.DECODER),
]


# Every network once, and every layout; the marker `slow` has the networks in their other layouts.
OTHER_LAYOUTS = ("diffusers_prior", "diffusers_decoder", "diffusers_decoder_lite", "comfyui_stage_c")


@pytest.mark.parametrize("dtype", ["BF16", pytest.param("F32", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "stage"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (case[0] in OTHER_LAYOUTS)) for case in CASES],
    ids=str,
)
def test_weights_by_reference(catalog_folder: Path, tmp_path: Path, name: str, stage: Stage, dtype: str) -> None:
    """Up to 18 GB of holes: without hashes, neither export nor validate reads the weights."""
    source = tmp_path / f"{name}.safetensors"
    write_stand_in(catalog_folder / f"{name}.json", source, dtype, holes=True)
    manifest = export(source, tmp_path / "bundle", stages=[stage], weights="link", hash=False)
    entry = manifest.stages[stage]
    assert entry.variant == ("lite" if name.endswith("_lite") else "full")
    assert (tmp_path / "bundle" / stage / source.name).samefile(source)
    checked = validate(open_bundle(tmp_path / "bundle"))
    assert checked, checked.to_json()
