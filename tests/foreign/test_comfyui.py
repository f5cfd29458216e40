"""ComfyUI's own code reads our files: its loader of weights, its networks, its LoRAs.

It is no package. Where the folder `oracles` of the environment has no checkout, these tests are skipped. ComfyUI is
started once for all pictures, as that takes longer than the pictures."""

import json
from pathlib import Path

import numpy as np
import pytest

from cascadekit import convert
from cascadekit.converters.checkpoints.example_model import EXAMPLE_LORA, EXAMPLE_MODEL
from cascadekit.converters.lora.convert_lora import convert_lora
from cascadekit.converters.lora.merge_checkpoint import merge_loras
from helpers.format_pictures import of_checkpoints, record_pictures
from helpers.matrix import Matrix
from helpers.oracles import COMFYUI, comfyui, run_alone

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not comfyui(), reason=f"{COMFYUI}: no checkout of ComfyUI"),
]
FILES = {
    "comfyui": ("stable_cascade_stage_c.safetensors", "stable_cascade_stage_b.safetensors"),
    "split": ("stage_c.safetensors", "stage_b.safetensors"),
}
LORAS = ("comfyui", "kohya", "onetrainer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our files of each format, and the pictures of ComfyUI as FORMAT.npy."""
    place = tmp_path_factory.mktemp("comfyui")
    convert(EXAMPLE_MODEL, place / "model", "diffusers", dtype="fp32")
    jobs = []
    for layout, (prior, decoder) in FILES.items():
        convert(EXAMPLE_MODEL, place / layout, layout)
        paths = {"prior": place / layout / prior, "decoder": place / layout / decoder}
        jobs.append({**paths, "out": place / f"{layout}.npy"})
    for form in LORAS:
        lora = place / f"lora_{form}.safetensors"
        convert_lora(EXAMPLE_LORA, lora, form, against=EXAMPLE_MODEL / "stage_c.safetensors")
        jobs.append({**jobs[0], "lora": lora, "out": place / f"lora {form}.npy"})
    (place / "jobs.json").write_text(json.dumps(jobs, default=str))
    run_alone("foreign.comfyui_alone", place / "model", place / "jobs.json", path=COMFYUI)
    return place


@pytest.fixture(scope="module")
def unquantised(folder: Path) -> np.ndarray:
    """Our pictures of the model as it is."""
    return of_checkpoints([folder / "model"], folder / "plain")


@pytest.fixture(scope="module")
def merged(folder: Path) -> np.ndarray:
    """Our pictures of the model with the LoRA."""
    merge_loras(folder / "model", [EXAMPLE_LORA], folder / "merged")
    return of_checkpoints([folder / "merged"], folder / "with_lora")


@pytest.mark.parametrize("layout", FILES)
def test_checkpoints(layout: str, folder: Path, unquantised: np.ndarray, tmp_path: Path, matrix: Matrix) -> None:
    theirs, found = np.load(folder / f"{layout}.npy"), of_checkpoints([folder / layout], tmp_path)
    record_pictures(matrix, layout, "ComfyUI", theirs, found, unquantised=unquantised, version=comfyui())


@pytest.mark.parametrize("form", LORAS)
def test_loras(form: str, folder: Path, merged: np.ndarray, matrix: Matrix) -> None:
    theirs = np.load(folder / f"lora {form}.npy")
    assert np.abs(theirs - np.load(folder / "comfyui.npy")).max() > 0.2, "the LoRA changes nothing"
    record_pictures(matrix, f"lora {form}", "ComfyUI", theirs, merged, version=comfyui())
