"""Safetensors files as literal bytes, and the plans that copy them."""

import json
import struct
from pathlib import Path
from typing import Any

from cascadekit.storage.safetensors_plan import TensorPlan
from cascadekit.storage.safetensors_reader import read_header


def raw(header: Any, data: bytes = b"", *, pad: bool = False) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8) if pad else b""
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def copied(source: Path) -> dict[str, TensorPlan]:
    return {name: TensorPlan(t.dtype, t.shape, (t,)) for name, t in read_header(source).tensors.items()}
