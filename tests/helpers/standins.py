"""Stand-ins for the official files: the real names, shapes and sizes from the catalog, with random weights or none.

As awkward as the originals: the header as Python's json module writes it, 13.5 kB of metadata, no padding, so that
the tensors start at an odd byte.
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

SIZES = {"F32": 4, "BF16": 2, "I64": 8, "I8": 1, "U8": 1}
Content = dict[str, tuple[str, tuple[int, ...], bytes]]  # dtype, shape, and the bytes, or b"" for a hole
TORCH = {"F32": torch.float32, "BF16": torch.bfloat16}


def write_stand_in(catalog: Path, target: Path, dtype: str = "F32", *, holes: bool = False) -> dict[str, Any]:
    """Write the file described by `catalog` to `target`; with `holes` its data is a hole that takes no disk space.

    Returns the catalog's content. Memory: the largest tensor."""
    content: dict[str, Any] = json.loads(catalog.read_text())
    tensors: dict[str, Any] = content["tensors"]
    header: dict[str, Any] = {"__metadata__": {"modelspec.title": "stand-in", "modelspec.thumbnail": "x" * 13_500}}
    position = 0
    for name, spec in tensors.items():
        stored = "I64" if spec["dtype"] == "I64" else dtype
        nbytes = math.prod(spec["shape"]) * SIZES[stored]
        header[name] = {"dtype": stored, "shape": spec["shape"], "data_offsets": [position, position + nbytes]}
        position += nbytes
    header["__metadata__"]["modelspec.thumbnail"] += "x" * ((3 - len(json.dumps(header))) % 8)
    text = json.dumps(header).encode()
    generator = torch.Generator().manual_seed(0)
    with target.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if holes:
            file.truncate(8 + len(text) + position)
            return content
        for name, spec in tensors.items():
            if spec["dtype"] == "I64":
                values = torch.full(spec["shape"], 1000)
            else:
                values = _values(name, spec["shape"], generator).to(TORCH[dtype])
            file.write(values.reshape(-1).view(torch.uint8).numpy())
    return content


def write_holes(target: Path, content: Content, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose tensors are holes, but for those with bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position, given = 0, {}
    for name, (dtype, shape, data) in content.items():
        nbytes = math.prod(shape) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + nbytes]}
        given[position] = data
        position += nbytes
    text = json.dumps(header).encode()
    with target.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)
        for start, data in given.items():
            file.seek(8 + len(text) + start)
            file.write(data)


def accept_changes(bundle: Path) -> None:
    """Let a bundle's manifest say of its files what they are now, so that faults planted in them are loaded."""
    path = bundle / "cascade.json"
    content = json.loads(path.read_text())
    for stage in content["stages"].values():
        for file in stage["files"]:
            data = (bundle / file["path"]).read_bytes()
            file |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(content))


def _values(name: str, shape: list[int], generator: torch.Generator) -> torch.Tensor:
    """Nothing zero, and every layer's output near the size of its input."""
    if name.endswith("running_var"):
        return torch.rand(shape, generator=generator) + 0.5
    deviation = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 and "channelwise.2" not in name else 0.1
    return torch.randn(shape, generator=generator) * deviation
