"""The fingerprint of a file, and which changes it and the whole hash notice."""

import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cascadekit.storage.file_hashes import WHOLE_BELOW, describe_file, find_change, fingerprint
from helpers.files import flip


def expected_fingerprint(path: Path) -> str:
    """As the docstring says it: size, header, 64 evenly spaced samples of 64 KiB."""
    data = path.read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0] if data[8:9] == b"{" else 0
    body = data[header:]
    samples = [body]
    if len(body) > 64 * 65536:
        starts = [(len(body) - 65536) * n // 63 for n in range(64)]
        samples = [body[start : start + 65536] for start in starts]
    return hashlib.sha256(struct.pack("<Q", len(data)) + data[:header] + b"".join(samples)).hexdigest()


@pytest.mark.parametrize("values", [0, 1, 4097, 1 << 20, (1 << 20) + 1, 3_000_001])
@pytest.mark.parametrize("suffix", [".safetensors", ".onnx"])
def test_fingerprint(tmp_path: Path, values: int, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    save_file({"x": np.random.default_rng(values).random(values, np.float32)}, path)
    assert fingerprint(path) == expected_fingerprint(path)


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 100, struct.pack("<Q", 10**9) + b"x" * 100])
def test_fingerprint_of_what_is_no_safetensors_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(content)
    assert fingerprint(path) == hashlib.sha256(struct.pack("<Q", len(content)) + content).hexdigest()


def test_large_files_are_compared_by_samples(tmp_path: Path) -> None:
    """Above 64 MiB a change between two samples is not seen on loading, but by the whole hash."""
    path = tmp_path / "x.safetensors"
    save_file({"x": np.zeros(WHOLE_BELOW // 4, np.float32)}, path)
    entry = describe_file(tmp_path, path, hashlib.sha256(path.read_bytes()).hexdigest())
    assert entry.bytes > WHOLE_BELOW
    flip(path, 1_000_000)
    assert find_change(path, entry) is None
    assert "expected SHA-256" in str(find_change(path, entry, always_hash=True))
    unhashed = entry.model_copy(update={"sha256": None})
    assert find_change(path, unhashed, always_hash=True) is None  # samples are all there is to compare
    flip(path, entry.bytes - 1)
    assert "expected fingerprint" in str(find_change(path, entry))
    os.utime(path, ns=(0, entry.mtime_ns))
    assert find_change(path, unhashed) is None
    assert "expected fingerprint" in str(find_change(path, unhashed, always_hash=True))  # whatever its time
