"""Files of the released size, 14 GB and more, are converted within 200 MB of memory.

Sources are holes in the page cache; outputs are real. The peak is VmHWM, the resident memory of the process, with its
mapped files. 200 MB come on top of what the process has once its modules are imported. Run with `-s`, the test prints
peaks and seconds. It needs 25 GB of disk.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cascadekit.converters.checkpoints.model_folder import write_folder_files
from cascadekit.schemas.stages import PRESETS, Stage, Variant
from helpers.standins import write_stand_in

MOST = 200e6
PROGRAM = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
from helpers.peak_memory import reset_peak, status
from cascadekit.converters.checkpoints.convert import convert
job = json.loads(sys.argv[2])
before, start = reset_peak(), time.perf_counter()
done = convert(**job)
print(json.dumps([status("VmHWM") - before, status("VmHWM"), time.perf_counter() - start]))
"""
PASSPORT = b"cascadekit.passport"
Job = dict[str, Any]
# What is written from the prior, and what the file is read into.
ROUNDS: dict[str, tuple[Job, Job]] = {
    "gguf-f16": ({"to": "gguf", "dtype": "fp16"}, {"to": "original", "dtype": "fp32"}),
    "gguf-q6_k": ({"to": "gguf", "quantize": "q6_k"}, {"to": "original", "dtype": "bf16"}),
    **{
        f"comfyui-{kind}": ({"to": "comfyui", "quantize": kind}, {"to": "original", "dtype": "fp32"})
        for kind in ("fp8", "int8", "nvfp4")
    },
    **{
        kind: ({"to": "diffusers", "quantize": kind}, {"to": "original", "dtype": "fp32"})
        for kind in ("sdnq_int8", "sdnq_uint4")
    },
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc"),
]


@pytest.fixture(scope="module")
def released(catalog_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Every network in float32 as holes: 26 GB that take no disk."""
    folder = tmp_path_factory.mktemp("released")
    for name in ("stage_a", "stage_b", "stage_c", "effnet_encoder", "previewer"):
        write_stand_in(catalog_folder / f"original_{name}.json", folder / f"{name}.safetensors", holes=True)
    write_folder_files(folder, {Stage.TEXT_ENCODER: PRESETS[Stage.TEXT_ENCODER, Variant.FULL]}, index=False)
    encoder = folder / Stage.TEXT_ENCODER / "model.safetensors"
    write_stand_in(catalog_folder / "diffusers_text_encoder.json", encoder, holes=True)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)  # pytest would keep tens of gigabytes until its next runs


def require_little_memory(name: str, sources: Path, output: Path, job: Job) -> None:
    """Convert in a process of its own."""
    job = {"sources": str(sources), "output": str(output), **job}
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parents[2]), json.dumps(job)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    more, peak, seconds = json.loads(ended.stdout.splitlines()[-1])
    nbytes = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"{name}: {nbytes / 1e9:.1f} GB in {seconds:.0f} s, {more / 1e6:.0f} MB more, {peak / 1e6:.0f} MB in all")
    weights = [path for path in output.rglob("*") if path.suffix in (".safetensors", ".gguf")]
    assert weights
    for path in weights:
        with path.open("rb") as file:
            assert PASSPORT in file.read(1 << 22)
    assert more < MOST


def test_the_modular_folder_of_the_whole_cascade(released: Path, place: Path) -> None:
    require_little_memory("modular", released, place / "modular", {"to": "modular"})


@pytest.mark.parametrize("name", ROUNDS)
def test_the_prior_there_and_back(released: Path, place: Path, name: str) -> None:
    write, read = ROUNDS[name]
    require_little_memory(f"{name} written", released / "stage_c.safetensors", place / "there", write)
    require_little_memory(f"{name} read", place / "there", place / "back", read)
