"""Measures conversions, and commands of the system that read and write the same bytes."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

from ..converters.checkpoints.component import Component
from ..schemas.callbacks import Say, ignored
from ..schemas.config_json import to_json
from ..schemas.dtypes import DTYPE_SIZES
from ..schemas.errors import UsageError
from ..schemas.layouts import Layout
from ..schemas.stages import UNetConfig
from .bench_report import BenchReport, Case
from .process import PACKAGE, bench_folder, floor_rss, measure_all
from .standins import describe, main_dtype, source_file

CAST_TO = {"F32": "BF16", "BF16": "F32"}
OPTIONS = {"F32": "fp32", "BF16": "bf16"}  # --dtype's spelling
TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16"}
PAIRS = (
    ("convert", "cp"),
    ("convert_cold", "cp_cold"),
    ("cast", "cast_in_memory"),
    ("cast", "write"),
    ("inspect", "import"),
    ("peer", "convert"),
)

COPY = 'cp "$1" "$2" && sync "$2"'
WRITE = 'cat "$1" "$1" | head -c "$3" > "$2" && sync "$2"'
PEER = """
import os, sys
import torch
from diffusers import StableCascadeUNet
source, config, output, dtype = sys.argv[1:]
dtype = getattr(torch, dtype)
model = StableCascadeUNet.from_single_file(source, config=config, torch_dtype=dtype, local_files_only=True)
model.save_pretrained(output)
for entry in os.scandir(output):
    descriptor = os.open(entry.path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
"""


def bench_convert(
    work: Path,
    *,
    network: str = "prior-lite",
    dtype: str = "BF16",
    source: Path | None = None,
    runs: int = 3,
    cold: bool = False,
    peer: bool = False,
    say: Say = ignored,
) -> BenchReport:
    """Measure conversions of `source`, or of a stand-in for `network` in `dtype`, in a folder below `work`.

    The folder is removed at the end. `peer` measures diffusers too. `say` is called with a line for each step.
    Raises UsageError for a wrong source or work folder and without the peer, ConversionError when a command fails."""
    if peer and find_spec("diffusers") is None:
        raise UsageError("the peer is diffusers, which is not installed: pip install diffusers torch")
    with bench_folder(work, peer=peer) as (folder, machine):
        outputs = 1 if dtype == "F32" and source is None else 2
        component, file = source_file(folder, network, dtype, given=source, outputs=outputs, say=say)
        cases = _measured_commands(component, file, folder, cold=cold, peer=peer)
        return BenchReport(
            machine=machine,
            source=describe(component, file, generated=source is None),
            cases=cases,
            runs=measure_all(cases, file, folder / "output", runs, say),
            pairs=PAIRS,
            floor_rss=floor_rss(),
        )


def _measured_commands(component: Component, file: Path, folder: Path, *, cold: bool, peer: bool) -> tuple[Case, ...]:
    """Everything to measure, in the order of a round."""
    dtype = main_dtype(component)
    size, output = file.stat().st_size, str(folder / "output")
    convert = (*PACKAGE, "convert", str(file), "-o", output, "--to", "diffusers")
    copy = ("sh", "-c", COPY, "sh", str(file), output)
    cast = (*convert, "--dtype", OPTIONS[CAST_TO[dtype]])
    written = size // DTYPE_SIZES[dtype] * DTYPE_SIZES[CAST_TO[dtype]]
    write = ("sh", "-c", WRITE, "sh", str(file), output, str(written))
    in_memory = f"from cascadekit.bench.cast_in_memory import main; main({dtype!r}, {size})"
    cases = [
        Case("convert", "cascadekit convert --to diffusers", convert, size),
        Case("cp", "cp FILE COPY && sync COPY", copy, size),
        Case("cast", f"cascadekit convert --dtype {cast[-1]}", cast, size),
        Case(
            "cast_in_memory", "two threads of numpy, no file", (sys.executable, "-c", in_memory), size, own_clock=True
        ),
        Case("write", "as many bytes as the cast gives, written as they come && sync", write, size),
        Case("inspect", "cascadekit inspect", (*PACKAGE, "inspect", str(file))),
        Case("import", "python -c 'import cascadekit'", (sys.executable, "-c", "import cascadekit")),
    ]
    if cold:
        cases[2:2] = [
            Case("convert_cold", "the same, source not in the page cache", convert, size, cold=True),
            Case("cp_cold", "the same, source not in the page cache", copy, size, cold=True),
        ]
    if peer:
        cases.insert(0, _peer(component, file, folder, dtype))
    return tuple(cases)


def _peer(component: Component, file: Path, folder: Path, dtype: str) -> Case:
    """The same conversion by diffusers, with a local config so that it needs no network."""
    if not isinstance(component.config, UNetConfig) or component.layout is not Layout.ORIGINAL:
        raise UsageError(f"{file}: the peer reads the prior and the decoder in the original layout only")
    config = folder / "config"
    config.mkdir()
    (config / "config.json").write_text(json.dumps(to_json(component.config)), encoding="utf-8")
    command = (sys.executable, "-c", PEER, str(file), str(config), str(folder / "output"), TORCH_NAMES[dtype])
    return Case("peer", "diffusers from_single_file, save_pretrained, fsync", command, component.path.stat().st_size)
