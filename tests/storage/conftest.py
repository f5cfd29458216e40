"""Weights files that several tests of this folder read."""

from pathlib import Path

import numpy as np
import pytest

from helpers.safetensors_bytes import entry, raw


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """x = [[0, 1], [2, 3], [4, 5]] float32 and counter = 7, unpadded header, out of order."""
    path = tmp_path / "two.safetensors"
    data = np.arange(6, dtype="<f4").tobytes() + np.array(7, "<i8").tobytes()
    path.write_bytes(
        raw({"__metadata__": {"a": "b"}, "counter": entry([], 24, 32, "I64"), "x": entry([3, 2], 0, 24)}, data)
    )
    return path
