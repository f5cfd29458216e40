"""The reader of headers against damaged and hostile files; the safetensors library judges."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cascadekit.schemas.dtypes import DTYPES
from cascadekit.schemas.errors import CheckpointError
from cascadekit.storage.safetensors_reader import read_header
from helpers.safetensors_bytes import entry, raw


def test_header_in_file_order(two: Path) -> None:
    header = read_header(two)
    assert list(header.tensors) == ["x", "counter"]
    assert header.shapes == {"x": (3, 2), "counter": ()}
    assert header.metadata == {"a": "b"}


GOOD = {"x": entry([2], 0, 8), "y": entry([1], 8, 12)}
DAMAGED = {
    "empty file": (b"", "not a safetensors file"),
    "short": (b"\x10\x00", "not a safetensors file"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
    "pickle": (b"\x80\x02}q\x00.", "pickle"),
    "zip": (b"PK\x03\x04" + b"\0" * 60, "pickle"),
    "huge header": (struct.pack("<Q", 1 << 40) + b"{}", "header of 1099511627776 bytes"),
    "truncated header": (struct.pack("<Q", 1000) + b"{}", "truncated"),
    "truncated data": (raw(GOOD, b"\0" * 5), "7 missing"),
    "trailing bytes": (raw(GOOD, b"\0" * 15), "3 bytes follow"),
    "gap": (raw({"x": entry([2], 0, 8), "y": entry([1], 9, 13)}, b"\0" * 13), "y starts at byte"),
    "overlap": (raw({"x": entry([2], 0, 8), "y": entry([1], 4, 8)}, b"\0" * 8), "y starts at byte"),
    "not json": (raw(b"{'x': 1}"), "damaged safetensors header"),
    "not utf-8": (raw(b'{"\xff": 1}'), "damaged safetensors header"),
    "not an object": (raw([]), "not an object"),
    "deep nesting": (raw(b"[" * 100_000), "damaged safetensors header"),
    "duplicate key": (raw(b'{"x":' + json.dumps(entry([], 0, 0)).encode() + b',"x":1}'), "'x' occurs twice"),
    "list as dtype": (raw({"x": entry([1], 0, 4) | {"dtype": ["F32"]}}, b"\0" * 4), "is not a name"),
    "negative size": (raw({"x": entry([-1, -1], 0, 4)}, b"\0" * 4), r"shape \[-1, -1\]"),
    "bool as size": (raw({"x": entry([True], 0, 4)}, b"\0" * 4), "shape"),
    "overflowing size": (raw({"x": entry([1 << 62, 4], 0, 4)}, b"\0" * 4), "more values than can be counted"),
    "offsets do not fit": (raw({"x": entry([2], 0, 4)}, b"\0" * 4), "takes 8 bytes, data_offsets give it 4"),
    "offsets backwards": (raw({"x": entry([1], 4, 0)}, b"\0" * 4), "give it -4"),
    "entry is a list": (raw({"x": [1]}, b""), "expected dtype, shape"),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), "strings to strings"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_header(path)


ODD_VALUES = st.sampled_from([None, -1, 0, 1, 3, 1 << 63, 0.5, "F32", "F16", "I64", [], [0], [2, 2], [0, 8], {}, True])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_accepted_the_library_accepts_too(tmp_path: Path, data: st.DataObject) -> None:
    """Mutate a good header in one field, or cut or flip bytes: no crash, and never laxer than the library."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}, "x": entry([2], 0, 8), "y": entry([2, 2], 8, 16, "F16")}
    if data.draw(st.booleans()):
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        header[data.draw(st.sampled_from(["x", "y"]))][field] = data.draw(ODD_VALUES)
    content = bytearray(raw(header, bytes(range(16)), pad=data.draw(st.booleans())))
    for _ in range(data.draw(st.integers(0, 2))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.one_of(st.none(), st.integers(0, len(content))))]
    path = tmp_path / "mutated.safetensors"
    path.write_bytes(content)
    try:
        ours = read_header(path)
    except CheckpointError:
        return
    if any(tensor.dtype not in DTYPES for tensor in ours.tensors.values()):
        return  # a dtype that the library does not know yet, which is accepted on purpose
    with safetensors.safe_open(path, "np") as theirs:
        assert set(theirs.keys()) == set(ours.tensors)
        for name, tensor in ours.tensors.items():
            values = theirs.get_tensor(name)
            assert values.shape == tensor.shape
            assert values.tobytes() == bytes(content[tensor.offset : tensor.offset + tensor.nbytes])


@pytest.mark.parametrize("length", [0x80, 0x4B50])
def test_a_header_whose_length_looks_like_a_pickle(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw(b"{}" + b" " * (length - 2)))
    assert read_header(path).tensors == {}
