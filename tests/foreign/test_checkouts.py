"""ComfyUI's and Stability's own code read our files: weights into their networks, and their LoRAs.

Neither is a package. Where the folder `oracles` of the environment has no checkout, these tests are skipped. Each
program is started once for all of its pictures."""

import json
from pathlib import Path

import numpy as np
import pytest

from cascadekit import convert
from cascadekit.converters.checkpoints.example_model import EXAMPLE_LORA, EXAMPLE_MODEL
from cascadekit.converters.lora.convert_lora import convert_lora
from cascadekit.converters.lora.merge_checkpoint import merge_loras
from cascadekit.schemas.comfy_formats import CHOICES
from helpers.format_pictures import of_checkpoints, record_pictures
from helpers.matrix import Matrix
from helpers.oracles import COMFYUI, STABILITY, checkouts, run_alone

pytestmark = pytest.mark.slow
RUN = {"ComfyUI": ("foreign.comfyui_alone", COMFYUI), "StableCascade": ("foreign.stability_alone", STABILITY)}
# Layout, and what it is quantised to -> the program, and the start of the names of its files of stage C and B.
CHECKPOINTS = {
    "comfyui": ("ComfyUI", "stable_cascade_"),
    **{f"comfyui {kind.lower()}": ("ComfyUI", "stable_cascade_") for kind in CHOICES},
    "split": ("ComfyUI", ""),
    "original": ("StableCascade", ""),
}
# Format of a LoRA -> the program, and the layout of the checkpoint that it is for.
LORAS = {
    **dict.fromkeys(("comfyui", "kohya", "onetrainer"), ("ComfyUI", "comfyui")),
    "stability": ("StableCascade", "original"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our files of each format, and the pictures of the programs that are there as FORMAT.npy."""
    place = tmp_path_factory.mktemp("checkouts")
    convert(EXAMPLE_MODEL, place / "model", "diffusers", dtype="fp32")
    jobs: dict[str, list[dict[str, Path]]] = {program: [] for program in RUN}
    files = {}
    for name, (program, start) in CHECKPOINTS.items():
        layout, _, kind = name.partition(" ")
        convert(EXAMPLE_MODEL, place / name, layout, quantize=kind or None)
        files[name] = {
            stage: place / name / f"{start}{letter}.safetensors"
            for stage, letter in (("prior", "stage_c"), ("decoder", "stage_b"))
        }
        jobs[program].append({**files[name], "out": place / f"{name}.npy"})
    for form, (program, layout) in LORAS.items():
        lora = place / f"lora_{form}.safetensors"
        convert_lora(EXAMPLE_LORA, lora, form, against=EXAMPLE_MODEL / "stage_c.safetensors")
        jobs[program].append({**files[layout], "lora": lora, "out": place / f"lora {form}.npy"})
    for program in checkouts():
        module, path = RUN[program]
        (place / program).write_text(json.dumps(jobs[program], default=str))
        run_alone(module, place / "model", place / program, path=path)
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


def version(program: str) -> str:
    if program not in checkouts():
        pytest.skip(f"{RUN[program][1]}: no checkout")
    return checkouts()[program]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(name: str, folder: Path, unquantised: np.ndarray, tmp_path: Path, matrix: Matrix) -> None:
    program = CHECKPOINTS[name][0]
    found = version(program)
    theirs, ours = np.load(folder / f"{name}.npy"), of_checkpoints([folder / name], tmp_path)
    record_pictures(matrix, name, program, theirs, ours, unquantised=unquantised, version=found)


@pytest.mark.parametrize("form", LORAS)
def test_loras(form: str, folder: Path, unquantised: np.ndarray, merged: np.ndarray, matrix: Matrix) -> None:
    program = LORAS[form][0]
    found = version(program)
    theirs = np.load(folder / f"lora {form}.npy")
    assert np.abs(theirs - unquantised).max() > 0.2, "the LoRA changes nothing"
    record_pictures(matrix, f"lora {form}", program, theirs, merged, version=found)
