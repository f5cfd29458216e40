"""Our reader of headers against the safetensors library's, on hand-made and on mutated headers.

Headers that the library accepts are accepted, others are refused, with the differences in KEPT."""

import json
import random
import struct
from pathlib import Path

import pytest
from safetensors import SafetensorError, safe_open

from cascadekit.schemas.errors import CheckpointError
from cascadekit.storage.safetensors_reader import read_header

F32 = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


def of(dtype: str = "F32", shape: str = "1", offsets: str = "0,4", more: str = "") -> str:
    return f'{{"x":{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{offsets}]{more}}}}}'


def named(name: str) -> str:
    return f'{{"{name}":{F32}}}'


def with_metadata(metadata: str) -> str:
    return f'{{"__metadata__":{metadata},"x":{F32}}}'


# Headers of one F32 value unless said otherwise, as text or bytes, and the bytes that follow.
SAME: dict[str, tuple[str | bytes, int]] = {
    "plain": (of(), 4),
    "byte order mark": (b"\xef\xbb\xbf" + of().encode(), 4),
    "utf-16": (of().encode("utf-16"), 4),
    "utf-16 without a mark": (of().encode("utf-16-le"), 4),
    "no tensor": ("{}", 0),
    "no header": ("", 0),
    "one space": (" ", 0),
    "space before": (" \n\t\r" + of(), 4),
    "space after": (of() + " \n\t\r", 4),
    "form feed after": (of() + "\f", 4),
    "padded with zeros": (of() + "\0\0", 4),
    "something after": (of() + "x", 4),
    "a second object": (of() + "{}", 4),
    "a list": ("[]", 0),
    "trailing comma": (of()[:-1] + ",}", 4),
    "comment": ("{/**/}", 0),
    "NaN": ('{"x":NaN}', 0),
    "NaN in metadata": (with_metadata('{"a":NaN}'), 4),
    "NaN in a field unknown": (of(more=',"z":NaN'), 4),
    "Infinity in a field unknown": (of(more=',"z":-Infinity'), 4),
    "out of range": (of(more=',"z":1e999'), 4),
    "an integer out of range": (of(more=',"z":' + "9" * 400), 4),
    "an integer without end": (of(more=',"z":' + "9" * 5000), 4),
    "a large integer": (of(more=',"z":' + "9" * 50), 4),
    "field unknown": (of(more=',"z":[1,{"a":null}]'), 4),
    "null metadata": (with_metadata("null"), 4),
    "empty metadata": (with_metadata("{}"), 4),
    "metadata of numbers": (with_metadata('{"a":1}'), 4),
    "metadata of null": (with_metadata('{"a":null}'), 4),
    "metadata a list": (with_metadata("[]"), 4),
    "metadata a tensor": (f'{{"__metadata__":{F32}}}', 4),
    "float as size": (of(shape="1.0"), 4),
    "float as offset": (of(offsets="0,4.0"), 4),
    "exponent": (of(shape="1e0"), 4),
    "minus zero": (of(offsets="-0,4"), 4),
    "negative": (of(shape="-1"), 4),
    "text as size": (of(shape='"1"'), 4),
    "leading zero": (of(shape="01"), 4),
    "plus": (of(shape="+1"), 4),
    "true": (of(shape="true"), 4),
    "three offsets": (of(offsets="0,4,4"), 4),
    "null shape": (of().replace("[1]", "null"), 4),
    "no shape": ('{"x":{"dtype":"F32","data_offsets":[0,4]}}', 4),
    "scalar": (of(shape=""), 4),
    "empty name": (named(""), 4),
    "zero byte in a name": (named("\\u0000"), 4),
    "raw control character": (named("a\nb"), 4),
    "delete": (named("\x7f"), 4),
    "surrogate pair": (named("\\ud83d\\ude00"), 4),
    "high surrogate": (named("\\ud800"), 4),
    "low surrogate": (named("\\udc00"), 4),
    "surrogate in metadata": (with_metadata('{"a":"\\ud800"}'), 4),
    "surrogate in a field unknown": (of(more=',"z":["\\udfff"]'), 4),
    "surrogate as bytes": (b'{"\xed\xa0\x80":' + F32.encode() + b"}", 4),
    "overlong": (b'{"\xc0\x80":' + F32.encode() + b"}", 4),
    "not utf-8": (b'{"\xff":' + F32.encode() + b"}", 4),
    "unknown escape": (named("\\x"), 4),
    "escaped slash": (named("\\/"), 4),
    "escaped field": (of().replace('"dtype"', '"\\u0064type"'), 4),
    "size of 2^64": (of(shape="18446744073709551616"), 4),
    "no values of 2^64 - 1": (of(shape="18446744073709551615,0", offsets="0,0"), 0),
    "no values, the zero first": (of(shape="0,18446744073709551615,18446744073709551615", offsets="0,0"), 0),
    "no values, the zero too late": (of(shape="18446744073709551615,18446744073709551615,0", offsets="0,0"), 0),
    "too many values": (of(shape="18446744073709551615,2"), 4),
    "too many bits": (of(shape="2305843009213693952,8", offsets="0,0"), 0),
    "wrong size": (of(shape="2"), 4),
    "trailing byte": (of(), 5),
    "truncated": (of(), 2),
    "empty tensors at one place": (f'{{"a":{of(shape="0", offsets="0,0")[5:-1]},"x":{F32}}}', 4),
    "empty tensor at the end": (f'{{"x":{F32},"a":{of(shape="0", offsets="4,4")[5:-1]}}}', 4),
    "empty tensor in the middle": (f'{{"x":{F32},"a":{of(shape="0", offsets="2,2")[5:-1]}}}', 4),
    "empty tensor beyond": (f'{{"x":{F32},"a":{of(shape="0", offsets="9,9")[5:-1]}}}', 4),
    "gap": (f'{{"x":{F32},"y":{of(offsets="5,9")[5:-1]}}}', 9),
    "overlap": (f'{{"x":{F32},"y":{of(offsets="0,4")[5:-1]}}}', 4),
    **{dtype: (of(dtype, "8"), 8) for dtype in ("F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")},
    **{dtype: (of(dtype, "8", "0,8"), 8) for dtype in ("F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "U8", "BOOL")},
    "C64": (of("C64", "1", "0,8"), 8),
    "F4": (of("F4", "8"), 4),
    "F4, half a byte left": (of("F4", "7"), 4),
    "F6_E2M3": (of("F6_E2M3", "4", "0,3"), 3),
    "F6_E3M2": (of("F6_E3M2", "4", "0,3"), 3),
}

# Differences kept: whether we accept, and why we differ.
KEPT: dict[str, tuple[str, int, bool, str]] = {
    "name twice": (
        f'{{"x":{F32},"x":{F32}}}',
        4,
        False,
        "the format forbids it: of two programs each may take another",
    ),
    "key twice in metadata": (with_metadata('{"a":"b","a":"c"}'), 4, False, "the same"),
    "entry as a list": ('{"x":["F32",[1],[0,4]]}', 4, False, "the format knows objects only"),
    "dtype as an object": (of().replace('"F32"', '{"F32":null}'), 4, False, "the format knows names only"),
    "dtype of tomorrow": (of("F33", "3"), 4, True, "inspect tells the rest of the file"),
    "field unknown, deep": (of(more=',"z":' + "[" * 200 + "]" * 200), 4, True, "what is passed over may be anything"),
    "too many items": ('{"__metadata__":{"a":"' + "," * 4_000_001 + '"}}', 0, False, "memory, see schemas.limits"),
}


def write(path: Path, text: str | bytes, nbytes: int) -> Path:
    header = text.encode() if isinstance(text, str) else text
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(nbytes))
    return path


def theirs(path: Path) -> dict[str, list[int]] | None:
    try:
        with safe_open(path, "np") as file:
            return {name: file.get_slice(name).get_shape() for name in [*file.keys()]}
    except SafetensorError:
        return None


def ours(path: Path) -> dict[str, list[int]] | None:
    try:
        return {name: list(shape) for name, shape in read_header(path).shapes.items()}
    except CheckpointError:
        return None


@pytest.mark.parametrize(("text", "nbytes"), SAME.values(), ids=SAME)
def test_as_the_library(tmp_path: Path, text: str | bytes, nbytes: int) -> None:
    path = write(tmp_path / "x", text, nbytes)
    assert ours(path) == theirs(path)


@pytest.mark.parametrize(("text", "nbytes", "accepted", "reason"), KEPT.values(), ids=KEPT)
def test_differences_kept(tmp_path: Path, text: str, nbytes: int, accepted: bool, reason: str) -> None:
    path = write(tmp_path / "x", text, nbytes)
    assert (ours(path) is not None, theirs(path) is not None) == (accepted, not accepted), reason


VALUES = ["null", "-1", "0", "-0", "1", "1.0", "3", "18446744073709551616", '"F16"', '"U8"', '"é"', "[]", "[0]", "{}"]
VALUES += ["true", "NaN", "[0,8]", "[2,2]", '"\\ud800"', '"\\n"', "1e5", '{"a":"b"}', '"F4"', '"C64"', '"F8_E8M0"']
PIECES = [b" ", b"\t", b"\0", b"\xff", b"\xef\xbb\xbf", b",", b"{", b"}", b'"', b"\\", b"0", b"-", b"e1", b".0", b"//"]


def mutated(rng: random.Random) -> tuple[bytes, int]:
    """A header of three tensors and metadata with one to three changes, and how many bytes follow it."""
    fields = {
        '"x"': ['"F32"', "[2]", "[0,8]"],
        '"y"': ['"F16"', "[2,2]", "[8,16]"],
        '"e"': ['"I64"', "[0,3]", "[16,16]"],
    }
    entries, metadata = [*fields.values()], '{"format":"pt"}'
    change = rng.randrange(4)
    if change == 0:
        rng.choice(entries)[rng.randrange(3)] = rng.choice(VALUES)
    if change == 1:
        metadata = rng.choice(VALUES)
    keys = [rng.choice(['"\\u0000"', '""', '"__metadata_"', '"\\udead"']) if change == 2 else key for key in fields]
    if len(set(keys)) < len(keys):
        keys = [*fields]
    texts = [
        f'{key}:{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}'
        for key, (dtype, shape, offsets) in zip(keys, entries, strict=True)
    ]
    rng.shuffle(texts)
    text = bytearray(("{" + ",".join([f'"__metadata__":{metadata}', *texts]) + "}").encode())
    if change == 3:
        for _ in range(rng.randrange(1, 3)):
            at = rng.randrange(len(text) + 1)
            text[at : at + rng.randrange(2)] = rng.choice(PIECES)
    return bytes(text), 16 + rng.choice([0] * 6 + [-1, 1])


def differs_knowingly(text: bytes) -> bool:
    """Whether a header is of a kind in KEPT: a key twice, or a dtype unknown to the library."""
    twice: list[bool] = []

    def pairs(found: list[tuple[str, object]]) -> dict[str, object]:
        twice.append(len(dict(found)) != len(found))
        return dict(found)

    try:
        entries = json.loads(text.decode(), object_pairs_hook=pairs)
    except (ValueError, RecursionError):
        return False
    known = ("F32", "F16", "I64", "U8", "F4", "C64", "F8_E8M0")
    values = [value for value in entries.values() if isinstance(value, dict)] if isinstance(entries, dict) else []
    return any(twice) or any(isinstance(v.get("dtype"), str) and v["dtype"] not in known for v in values)


def test_mutated_headers(tmp_path: Path) -> None:
    rng = random.Random(13)
    accepted = 0
    for _ in range(3000):
        text, nbytes = mutated(rng)
        path = write(tmp_path / "x", text, nbytes)
        found = ours(path)
        if found != theirs(path):
            assert differs_knowingly(text), (text, nbytes)
        accepted += found is not None
    assert 300 < accepted < 2700


def test_a_key_that_stands_twice_in_a_large_header_is_found_at_once(tmp_path: Path) -> None:
    names = ",".join(f'"{i:x}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(60_000))
    path = write(tmp_path / "x", f'{{{names},"ea5f":1}}', 0)
    with pytest.raises(CheckpointError, match="'ea5f' occurs twice"):
        read_header(path)


def test_bytes_after_the_last_tensor_are_named_as_what_they_are(tmp_path: Path) -> None:
    path = write(tmp_path / "x", of(), 9)
    with pytest.raises(CheckpointError, match="5 bytes follow the last tensor") as caught:
        read_header(path)
    assert "damaged" not in str(caught.value)


def test_what_is_no_safetensors_file_is_named(tmp_path: Path) -> None:
    kinds = {
        b"": "it is empty",
        b"<!DOCTYPE html><html>": "a web page",
        b'{"weight_map": {}}': "JSON text",
        b"GGUF\x03\0\0\0\0\0": "GGUF",
        b"\x89HDF\r\n\x1a\n" + bytes(9): "HDF5",
        b"\x1f\x8b\x08\0" + bytes(20): "gzip",
        b"\x89PNG\r\n\x1a\n" + bytes(20): "a picture, not weights",
        b"\x08\x0a\x12\x10cascadekit 0.1.0": "an ONNX graph",
        b"a fox\na rocket, flat style\n": "text, not a safetensors file; give a weights file",
        b"\x7fELF\x02\x01\x01" + bytes(20): "announce a header of .*; give a weights file, or download",
    }
    for start, meaning in kinds.items():
        (tmp_path / "x").write_bytes(start)
        with pytest.raises(CheckpointError, match=meaning) as caught:
            read_header(tmp_path / "x")
        assert "damaged" not in str(caught.value)
