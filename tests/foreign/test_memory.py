"""The memory that every format takes, at real size: a process of its own writes it, another reads it back.

The weights are a stage B's. Its layers have the size of the lite one's, and the few of them make 0.74 GB. A file that
is only read has all layers. Nearly all weights are holes in the file, which read as zeros."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cascadekit.schemas.block_types import WRITTEN
from cascadekit.schemas.comfy_formats import CHOICES
from cascadekit.schemas.sdnq_formats import SDNQ_CHOICES
from helpers.matrix import Matrix
from helpers.quantised import FULL, full_decoder, short_decoder

BOUND = 200e6  # bytes
LEAST = 3.5  # times the bound that a file has, so that it cannot have been in memory


class Format(NamedTuple):
    function: str
    options: Mapping[str, Any]
    source: str = "decoder"
    bounded: bool = True


def to(layout: str, **options: Any) -> Format:
    return Format("convert", {"to": layout, **options})


FORMATS: dict[str, Format] = {
    **{layout: to(layout) for layout in ("original", "split", "diffusers", "modular", "comfyui", "gguf")},
    "diffusers in shards": to("diffusers", shard_size="300MB"),
    **{f"diffusers {kind.lower()}": to("diffusers", quantize=kind.lower()) for kind in SDNQ_CHOICES},
    **{f"gguf {kind.lower()}": to("gguf", quantize=kind.lower()) for kind in WRITTEN},
    **{f"comfyui {kind.lower()}": to("comfyui", quantize=kind.lower()) for kind in CHOICES},
    "bundle fp32": Format("export", {"weights": "copy"}),
    "openvino ir": Format("write_openvino_ir", {}, "bundle", bounded=False),
}


def peak_of(function: str, source: Path, output: Path, options: Mapping[str, Any]) -> int:
    command = [sys.executable, "-m", "foreign.memory_alone", function, str(source), str(output), json.dumps(options)]
    ended = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return int(ended.stdout.split()[-1])


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "decoder"
    short_decoder(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_memory_of_what_is_written(name: str, decoder: Path, tmp_path: Path, matrix: Matrix) -> None:
    function, options, source, bounded = FORMATS[name]
    model = decoder
    if source == "bundle":
        model = tmp_path / "bundle"
        peak_of("export", decoder, model, {"weights": "copy"})
    output = tmp_path / "output"
    peak = peak_of(function, model, output, options)
    assert size_of(model) > LEAST * BOUND
    if function == "convert":
        files = [path for path in output.rglob("*") if path.suffix in (".gguf", ".safetensors")]
        found = files[0] if len(files) == 1 and files[0].parent == output else output
        peak = max(peak, peak_of("convert", found, tmp_path / "read.safetensors", {"to": "split", "dtype": "fp16"}))
    assert not bounded or peak < BOUND
    matrix.record(name, "memory", peak / 1e6)


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"diffusers {kind}" for kind in FULL])
def test_memory_of_what_is_read(name: str, tmp_path: Path, matrix: Matrix) -> None:
    full_decoder(name.removeprefix("diffusers "), tmp_path / "decoder")
    assert size_of(tmp_path / "decoder") > LEAST * BOUND
    options = {"to": "split", "dtype": "bf16"}
    peak = peak_of("convert", tmp_path / "decoder", tmp_path / "read.safetensors", options)
    assert peak < BOUND
    matrix.record(name, "memory", peak / 1e6)
