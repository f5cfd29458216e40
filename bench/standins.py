"""Checkpoints of real size with random weights, for measuring without the real ones."""

import json
import math
import os
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..converters.checkpoints.component import Component
from ..converters.checkpoints.model_folder import write_folder_files
from ..converters.checkpoints.open_model import open_model
from ..schemas.callbacks import Say
from ..schemas.dtypes import DTYPE_SIZES
from ..schemas.errors import UsageError
from ..schemas.layouts import Layout, to_diffusers
from ..schemas.stages import PRESETS, NetworkConfig, Stage, Variant
from ..schemas.tensors import Shape, expected_tensors, is_counter

NETWORKS: Mapping[str, tuple[Stage, Variant]] = {
    "prior": (Stage.PRIOR, Variant.FULL),
    "prior-lite": (Stage.PRIOR, Variant.LITE),
    "decoder": (Stage.DECODER, Variant.FULL),
    "decoder-lite": (Stage.DECODER, Variant.LITE),
    "vqgan": (Stage.VQGAN, Variant.FULL),
    "text-encoder": (Stage.TEXT_ENCODER, Variant.FULL),
    "tiny": (Stage.PRIOR, Variant.TINY),  # for tests; times of it say nothing
}
CASTABLE = ("F32", "BF16")  # dtypes of a source that benchmarks take

POOL = 1 << 22  # values of noise; each tensor begins at another place in it
VECTOR_DEVIATION = 0.1  # standard deviation of biases and factors


def source_file(
    folder: Path, network: str, dtype: str, *, given: Path | None = None, outputs: float, say: Say
) -> tuple[Component, Path]:
    """The component to measure with and its one file: `given`, or a stand-in that is written into `folder`.

    `outputs` is the size of the files that will be written besides, in sizes of the source. Raises UsageError for a
    source that is not one file of one component in F32 or BF16, and when the disk has too little space."""
    if given is None:
        config = PRESETS[NETWORKS[network]]
        nbytes = sum(map(math.prod, expected_tensors(config).values())) * DTYPE_SIZES[dtype]
        require_space(folder, (1 + outputs) * nbytes)
        say(f"writing a stand-in for {network}: {nbytes / 1e9:.2f} GB of {dtype}")
        file = write_stand_in(folder / "source.safetensors", config, dtype)
    else:
        file = given.absolute()
        require_space(folder, outputs * file.stat().st_size if file.is_file() else 0)
    components = list(open_model([file]).components.values())
    if not file.is_file() or len(components) != 1 or main_dtype(components[0]) not in CASTABLE:
        raise UsageError(f"{file}: expected a file of one component in {' or '.join(CASTABLE)}")
    return components[0].require_sound(), file


def main_dtype(component: Component) -> str:
    """The dtype of most tensors; empty without any."""
    ((dtype, _),) = component.dtypes.most_common(1) or [("", 0)]
    return dtype


def require_space(folder: Path, needed: float) -> None:
    """Raise UsageError unless `needed` bytes are free on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UsageError(
            f"{folder.parent}: expected {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free; give work=..., a "
            "folder on a larger disk"
        )


def describe(component: Component, file: Path, *, generated: bool) -> dict[str, Any]:
    """The description of the source for a report."""
    return {
        "file": "stand-in with random values" if generated else file.name,
        "component": str(component.stage),
        "variant": str(component.variant),
        "layout": str(component.layout),
        "dtype": main_dtype(component),
        "tensors": len(component.tensors),
        "bytes": file.stat().st_size,
    }


def write_stand_in(path: Path, config: NetworkConfig, dtype: str) -> Path:
    """Write a file with the network's names and shapes in F32 or BF16, flushed to disk; returns its path.

    It has the original layout. A text encoder, which has none, is written with its config.json into a folder beside
    `path`. The weights are random, below 2, and keep activations near 1. Holes in place of values would be read faster
    than a disk reads."""
    if config.stage is Stage.TEXT_ENCODER:
        write_folder_files(path.parent, {config.stage: config}, index=False)
        path = path.parent / config.stage / "model.safetensors"
        shapes = expected_tensors(config)
    else:
        made = to_diffusers(config.stage, Layout.ORIGINAL).inverse.apply(expected_tensors(config))
        shapes = {name: tensor.shape for name, tensor in made.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    dtypes = {name: "I64" if is_counter(name) else dtype for name in shapes}
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * DTYPE_SIZES[dtypes[name]]
        header[name] = {"dtype": dtypes[name], "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(header).encode()
    noise = np.random.Generator(np.random.SFC64(0)).uniform(-math.sqrt(3), math.sqrt(3), POOL).astype(np.float32)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for number, (name, shape) in enumerate(shapes.items()):
            if is_counter(name):
                file.write(np.full(shape, 1000, "<i8").tobytes())
            else:
                _write_values(file, name, shape, dtype, noise, start=number * 7919 % POOL)
        file.flush()
        os.fsync(file.fileno())
    return path


def _write_values(file: Any, name: str, shape: Shape, dtype: str, noise: NDArray[np.float32], start: int) -> None:
    """Write the values of one tensor: `noise` from `start` on, repeated."""
    matrix = len(shape) > 1
    deviation = 1 / math.sqrt(math.prod(shape[1:])) if matrix else VECTOR_DEVIATION
    centre = name.endswith("running_var") or ("norm" in name and name.endswith("weight") and not matrix)
    left = math.prod(shape)
    while left:
        values = noise[start : start + left] * np.float32(deviation) + np.float32(centre)
        bits = values.view(np.uint32)
        file.write((bits >> 16).astype("<u2") if dtype == "BF16" else bits.astype("<u4", copy=False))
        left -= len(values)
        start = 0
