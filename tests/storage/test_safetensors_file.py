"""The reader against damaged and hostile files, the writer against literal bytes; the safetensors library judges."""

import errno
import itertools
import json
import os
import random
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cascadekit.schemas.errors import CheckpointError, ConversionError
from cascadekit.storage import cast_ranges as computing
from cascadekit.storage import file_ranges as copying
from cascadekit.storage import safetensors_reader as safetensors_file
from cascadekit.storage.cast import target_dtype
from cascadekit.storage.cast_ranges import Counts
from cascadekit.storage.safetensors_plan import TensorPlan, canonical_order
from cascadekit.storage.safetensors_reader import read_header
from cascadekit.storage.safetensors_writer import write_safetensors


def raw(header: Any, data: bytes = b"", *, pad: bool = False) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8) if pad else b""
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """x = [[0, 1], [2, 3], [4, 5]] float32 and counter = 7, unpadded header, out of order."""
    path = tmp_path / "two.safetensors"
    data = np.arange(6, dtype="<f4").tobytes() + np.array(7, "<i8").tobytes()
    path.write_bytes(
        raw({"__metadata__": {"a": "b"}, "counter": entry([], 24, 32, "I64"), "x": entry([3, 2], 0, 24)}, data)
    )
    return path


def test_header_in_file_order(two: Path) -> None:
    header = read_header(two)
    assert list(header.tensors) == ["x", "counter"]
    assert header.shapes == {"x": (3, 2), "counter": ()}
    assert header.metadata == {"a": "b"}


def test_written_bytes(two: Path, tmp_path: Path) -> None:
    tensors = read_header(two).tensors
    x = tensors["x"]
    plan = {
        "last": TensorPlan("F32", (1, 2), (x.rows(2, 3, (1, 2)),)),
        "swapped": TensorPlan("F32", (2, 2), (x.rows(1, 2, (1, 2)), x.rows(0, 1, (1, 2)))),
        "counter": TensorPlan("I64", (), (tensors["counter"],)),
    }
    write_safetensors(tmp_path / "out", plan, {"format": "pt"})
    assert (tmp_path / "out").read_bytes() == (
        b"\xd8\x00\x00\x00\x00\x00\x00\x00"
        b'{"__metadata__":{"format":"pt"},'
        b'"last":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},'
        b'"swapped":{"dtype":"F32","shape":[2,2],"data_offsets":[8,24]},'
        b'"counter":{"dtype":"I64","shape":[],"data_offsets":[24,32]}}    '
        + struct.pack("<6f", 4, 5, 2, 3, 0, 1)
        + struct.pack("<q", 7)
    )
    loaded = safetensors.numpy.load_file(tmp_path / "out")
    assert loaded["swapped"].tolist() == [[2, 3], [0, 1]]


COPY_CALLS = ("copy_file_range", "sendfile", "pread")
CAST_BLOCKS = (1, 5, 64, 1 << 23)


def copied(source: Path) -> dict[str, TensorPlan]:
    return {name: TensorPlan(t.dtype, t.shape, (t,)) for name, t in read_header(source).tensors.items()}


def spy(monkeypatch: pytest.MonkeyPatch, call: str) -> list[tuple[Any, ...]]:
    """Every use of a call of os from now on, by its arguments."""
    calls: list[tuple[Any, ...]] = []
    real = getattr(os, call)

    def spying(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, spying)
    return calls


def refuse(number: int) -> Callable[..., Any]:
    def refusing(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return refusing


@pytest.mark.parametrize("used", COPY_CALLS)
@pytest.mark.parametrize("how", ["missing", "refused"])
def test_every_way_of_copying_gives_the_same(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, used: str, how: str
) -> None:
    """The calls before `used` are not there, or fail as between two file systems."""
    write_safetensors(tmp_path / "kernel", copied(two), {})
    for call in COPY_CALLS[: COPY_CALLS.index(used)]:
        if how == "missing":
            monkeypatch.delattr(os, call)
        else:
            monkeypatch.setattr(os, call, refuse(errno.EXDEV))
    calls = spy(monkeypatch, used)
    monkeypatch.setattr(copying, "COPY_BLOCK", 5)
    done: list[int] = []
    write_safetensors(tmp_path / "fallback", copied(two), {}, done.append)
    assert (tmp_path / "fallback").read_bytes() == (tmp_path / "kernel").read_bytes()
    assert len(calls) == len(done) == 7
    assert sum(done) == 32


def test_a_way_of_copying_may_fail_midway(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.copy_file_range, itertools.count()

    def once(*args: Any, **kwargs: Any) -> int:
        return real(*args, **kwargs) if next(calls) < 2 else refuse(errno.EXDEV)()

    monkeypatch.setattr(os, "copy_file_range", once)
    monkeypatch.setattr(copying, "COPY_BLOCK", 5)
    write_safetensors(tmp_path / "out", copied(two), {})
    assert safetensors.numpy.load_file(tmp_path / "out")["x"].tolist() == [[0, 1], [2, 3], [4, 5]]


def test_a_full_disk_is_noticed_before_copying(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", refuse(errno.ENOSPC))
    with pytest.raises(ConversionError, match=r"bytes needed\): No space left"):
        write_safetensors(tmp_path / "out", copied(two), {})
    assert (tmp_path / "out").stat().st_size == 0


def test_free_space_is_counted_before_any_is_taken(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spy(monkeypatch, "posix_fallocate")
    disk = SimpleNamespace(f_blocks=1000, f_bavail=2, f_frsize=50)
    monkeypatch.setattr(os, "fstatvfs", lambda target: disk)
    with pytest.raises(ConversionError, match=r"\(\d+ bytes needed\): No space left on device, 100 bytes are free"):
        write_safetensors(tmp_path / "out", copied(two), {})
    assert calls == []
    disk.f_blocks = disk.f_bavail = 0  # a file system that does not tell
    write_safetensors(tmp_path / "out", copied(two), {})
    assert len(calls) == 1


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, None])
def test_file_systems_that_cannot_reserve(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    if number is None:
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse(number))
    write_safetensors(tmp_path / "out", copied(two), {})
    assert safetensors.numpy.load_file(tmp_path / "out")["counter"] == 7


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_a_source_that_changed_meanwhile(two: Path, tmp_path: Path, dtype: str) -> None:
    x = read_header(two).tensors["x"]
    plan = {"x": TensorPlan(dtype, x.shape, (x,))}
    os.truncate(two, x.offset + 20)
    with pytest.raises(ConversionError, match=rf"^{two}: cannot be read: the file ended 4 bytes too early"):
        write_safetensors(tmp_path / "out", plan, {})
    two.unlink()
    with pytest.raises(ConversionError, match=rf"^{two}: cannot be read: No such file"):
        write_safetensors(tmp_path / "out", plan, {})


def test_an_output_that_cannot_be_opened(two: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"none/out: cannot be written \(\d+ bytes needed\): No such file"):
        write_safetensors(tmp_path / "none" / "out", copied(two), {})


# Casting and transposing


FLOAT_TENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Each float dtype in odd sizes, 0-d and empty, and whole numbers; no tensor lies at a multiple of its size."""
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, torch.Tensor] = {"flag": torch.tensor([True, False, True]), "steps": torch.tensor(7)}
    for name, dtype in FLOAT_TENSORS.items():
        for shape in ((), (0,), (1,), (3, 0), (7, 5), (2, 3, 1, 11)):
            values = torch.randn(shape, generator=generator) * 100
            tensors[f"{name}.{'x'.join(map(str, shape))}"] = values.to(dtype)
    path = tmp_path / "mixed.safetensors"
    path.write_bytes(unaligned(safetensors.torch.save(tensors)))
    assert all(t.offset % 2 for t in read_header(path).tensors.values())
    return path


def unaligned(content: bytes) -> bytes:
    """The same file with a byte more of padding in its header."""
    (length,) = struct.unpack("<Q", content[:8])
    return struct.pack("<Q", length + 1) + content[8 : 8 + length] + b" " + content[8 + length :]


@pytest.mark.parametrize("block", CAST_BLOCKS)
@pytest.mark.parametrize("wanted", FLOAT_TENSORS)
def test_casting_equals_torch(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, block: int
) -> None:
    monkeypatch.setattr(computing, "CAST_BLOCK", block)
    plans = {
        name: TensorPlan(target_dtype(t.dtype, wanted), t.shape, (t,)) for name, t in read_header(mixed).tensors.items()
    }
    done: list[int] = []
    assert write_safetensors(tmp_path / "out", plans, {}, done.append) == Counts()
    written, source = safetensors.torch.load_file(tmp_path / "out"), safetensors.torch.load_file(mixed)
    assert list(written) == list(source)
    for name, tensor in source.items():
        assert_same(written[name], tensor.to(FLOAT_TENSORS[wanted]) if tensor.is_floating_point() else tensor)
    assert sum(done) == sum(plan.nbytes for plan in plans.values()) == sum(t.nbytes for t in written.values())


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Dtype, shape and every bit."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert actual.flatten().view(torch.uint8).tolist() == expected.contiguous().flatten().view(torch.uint8).tolist()


def test_one_tensor_of_ranges_of_several_dtypes(mixed: Path, tmp_path: Path) -> None:
    tensors, source = read_header(mixed).tensors, safetensors.torch.load_file(mixed)
    names = [f"{dtype}.7x5" for dtype in FLOAT_TENSORS]
    cut = tensors["F32.7x5"].rows(2, 4, (2, 5))
    plan = TensorPlan("BF16", (30, 5), (*(tensors[name] for name in names), cut))
    write_safetensors(tmp_path / "out", {"all": plan, "steps": TensorPlan("I64", (), (tensors["steps"],))}, {})
    expected = torch.cat([*(source[name].bfloat16() for name in names), source["F32.7x5"][2:4].bfloat16()])
    written = safetensors.torch.load_file(tmp_path / "out")
    assert_same(written["all"], expected)
    assert written["steps"] == 7


@pytest.mark.parametrize("block", [1, 24, 100, 200, 1 << 23])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (5, 7), (3, 40), (40, 3), (16, 16), (0, 4), (4, 0)])
@pytest.mark.parametrize(("source", "target"), [("F32", "F32"), ("F32", "F16"), ("BF16", "F32"), ("I64", "I64")])
def test_transposing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, target: str, shape: tuple[int, int], block: int
) -> None:
    monkeypatch.setattr(computing, "CAST_BLOCK", block)
    kinds = FLOAT_TENSORS | {"I64": torch.int64}
    values = torch.randn(shape, generator=torch.Generator().manual_seed(6)).mul(1000).to(kinds[source])
    path = tmp_path / "in"
    stored = {"a": torch.zeros(3, dtype=kinds[source]), "turned": values.T.contiguous()}
    path.write_bytes(unaligned(safetensors.torch.save(stored)))
    tensors = read_header(path).tensors
    turned = replace(tensors["turned"], shape=shape, transposed=True)
    plans = {
        "before": TensorPlan(source, (3,), (tensors["a"],)),
        "turned": TensorPlan(target, shape, (turned,)),
        "after": TensorPlan(source, (3,), (tensors["a"],)),
    }
    done: list[int] = []
    write_safetensors(tmp_path / "out", plans, {}, done.append)
    written = safetensors.torch.load_file(tmp_path / "out")
    assert_same(written["turned"], values.to(kinds[target]))
    assert_same(written["before"], stored["a"])
    assert_same(written["after"], stored["a"])
    assert sum(done) == sum(plan.nbytes for plan in plans.values())


@settings(max_examples=300, deadline=None)
@given(rows=st.integers(0, 90), columns=st.integers(0, 90), limit=st.integers(1, 999))
def test_tiles_cover_a_matrix_once(rows: int, columns: int, limit: int) -> None:
    tiles = list(computing._tiles((rows, columns), limit))
    assert all(0 < len(down) * len(across) <= limit for down, across in tiles)
    assert sum(len(down) * len(across) for down, across in tiles) == rows * columns
    assert len({(down.start, across.start) for down, across in tiles}) == len(tiles)
    assert all(down.stop <= rows and across.stop <= columns for down, across in tiles)


def test_what_cannot_lie_transposed(two: Path) -> None:
    tensors = read_header(two).tensors
    turned = replace(tensors["x"], transposed=True)
    with pytest.raises(ConversionError, match="lies transposed; it has no row ranges"):
        turned.rows(0, 1, (1, 2))
    with pytest.raises(ConversionError, match=r"only a matrix can lie transposed, not a tensor of \[\]"):
        replace(tensors["counter"], transposed=True)


@pytest.mark.parametrize("transposed", [False, True])
def test_short_reads_and_writes(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transposed: bool) -> None:
    """A call may move less than it was asked to."""
    x = replace(read_header(two).tensors["x"], transposed=transposed)
    pread, pwrite = os.pread, os.pwrite
    monkeypatch.setattr(os, "pread", lambda source, nbytes, at: pread(source, min(nbytes, 3), at))
    monkeypatch.setattr(os, "pwrite", lambda target, data, at: pwrite(target, data[:3], at))
    write_safetensors(tmp_path / "out", {"x": TensorPlan("F16", (3, 2), (x,))}, {})
    written = safetensors.numpy.load_file(tmp_path / "out")["x"]
    assert written.tolist() == ([[0, 3], [1, 4], [2, 5]] if transposed else [[0, 1], [2, 3], [4, 5]])


@pytest.fixture
def large_values(tmp_path: Path) -> dict[str, TensorPlan]:
    """Seven tensors to be written as F16; the one named n has n values beyond it, and infinities which do not count."""
    path = tmp_path / "large"
    stored = {str(n): np.array([1e6] * n + [np.inf, 1, -np.inf], np.float32) for n in range(7)}
    safetensors.numpy.save_file(stored, path)
    return {name: TensorPlan("F16", t.shape, (t,)) for name, t in read_header(path).tensors.items()}


def test_overflow_is_an_error_that_names_the_worst(
    large_values: dict[str, TensorPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(computing, "CAST_BLOCK", 8)
    with pytest.raises(ConversionError) as caught:
        write_safetensors(tmp_path / "out", large_values, {})
    assert str(caught.value) == (
        "out: 21 finite values become infinite: 6 (6 in F16), 5 (5 in F16), 4 (4 in F16), 3 (3 in F16), 2 (2 in F16) "
        "and 1 more tensors; try dtype=\"bf16\", whose range is that of float32, or keep the infinities with "
        "allow_overflow=True"
    )


def test_overflow_may_be_allowed(large_values: dict[str, TensorPlan], tmp_path: Path) -> None:
    counts = write_safetensors(tmp_path / "out", large_values, {}, allow_overflow=True)
    assert counts.overflows == {str(n): n for n in range(1, 7)}
    assert counts.not_finite == {str(n): 2 for n in range(7)}
    assert safetensors.numpy.load_file(tmp_path / "out")["1"].tolist() == [np.inf, np.inf, 1, -np.inf]


def test_overflow_of_bf16_does_not_advise_bf16(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"x": np.array([3.4e38], np.float32)}, tmp_path / "in")
    x = read_header(tmp_path / "in").tensors["x"]
    with pytest.raises(ConversionError, match=r"x \(1 in BF16\); try a wider dtype"):
        write_safetensors(tmp_path / "out", {"x": TensorPlan("BF16", (1,), (x,))}, {})


def test_what_is_not_cast(two: Path, tmp_path: Path) -> None:
    tensors = read_header(two).tensors
    for name, dtype in (("counter", "F32"), ("x", "I64"), ("x", "F8_E4M3")):
        t = tensors[name]
        with pytest.raises(ConversionError, match=f"{two}: {name}: {t.dtype} cannot become {dtype}; only F16, BF16"):
            write_safetensors(tmp_path / "out", {name: TensorPlan(dtype, t.shape, (t,))}, {})
    assert not (tmp_path / "out").exists()


def test_workers_stop_before_the_file_is_closed(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception in the middle (here from progress, as Ctrl-C would be) leaves no thread that writes."""
    monkeypatch.setattr(computing, "CAST_BLOCK", 4)
    x = read_header(two).tensors["x"]
    threads = threading.active_count()

    def stop(nbytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:  # held, and with it every frame
        write_safetensors(tmp_path / "out", {"x": TensorPlan("F16", x.shape, (x,) * 100)}, {}, stop)
    assert threading.active_count() == threads
    assert caught.value


MEASURE = """
import pathlib, re, sys
from cascadekit.storage.safetensors_plan import TensorPlan
from cascadekit.storage.safetensors_reader import TensorRange
from cascadekit.storage.safetensors_writer import write_safetensors
source, out, dtype, target, rows, columns, transposed = sys.argv[1:]
shape, path = (int(rows), int(columns)), pathlib.Path(source)
part = TensorRange(path, dtype, shape, 0, path.stat().st_size, transposed == "True")
before = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
write_safetensors(pathlib.Path(out), {"x": TensorPlan(target, shape, (part,))}, {})
after = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
print(before // 1024, after // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of resident memory from /proc")
@pytest.mark.parametrize(
    ("dtype", "target", "size", "shape", "transposed"),
    [
        ("F32", "BF16", 1 << 30, (1 << 14, 1 << 14), False),
        ("BF16", "F32", 1 << 28, (1 << 13, 1 << 14), False),
        ("F8_E4M3", "BF16", 1 << 28, (1 << 14, 1 << 14), False),
        ("F32", "F16", 1 << 28, (1 << 13, 1 << 13), True),
        ("F32", "F32", 1 << 28, (2, 1 << 25), True),
        ("F32", "F32", 1 << 28, (1 << 25, 2), True),
    ],
)
def test_memory_does_not_grow_with_the_tensor(
    tmp_path: Path, dtype: str, target: str, size: int, shape: tuple[int, int], transposed: bool
) -> None:
    """A hole of 1 GiB or 256 MiB as one tensor, in a fresh process."""
    hole = tmp_path / "hole"
    hole.touch()
    os.truncate(hole, size)
    command = [sys.executable, "-c", MEASURE, hole, tmp_path / "out", dtype, target, *map(str, shape), str(transposed)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after = map(int, run.stdout.split())
    assert after < 200, f"{after} MiB, {before} before the call"
    (tmp_path / "out").unlink()


# The library's own writer


LIBRARY_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {'tab\t"quote"': "é 𝄞 \u2028 \x1f \x7f \\ /"}])
@pytest.mark.parametrize("seed", range(5))
def test_canonical_files_are_the_librarys_own(tmp_path: Path, metadata: dict[str, str] | None, seed: int) -> None:
    rng = random.Random(seed)
    names = ["b", "a", "a.10", "a.9", "Z", "é", "𝄞", "\uffff", "ab", "a_", '"', "a\n", " "]
    drawn = [(name, dtype) for name in names for dtype in rng.sample(sorted(LIBRARY_DTYPES), 5)]
    rng.shuffle(drawn)
    shapes = [(), (0,), (3,), (2, 3), (1, 0, 2)]
    tensors = {
        f"{name}{index}": torch.ones(rng.choice(shapes)).to(LIBRARY_DTYPES[dtype])
        for index, (name, dtype) in enumerate(drawn)
    }
    safetensors.torch.save_file(tensors, tmp_path / "library", metadata)
    plans = list(copied(tmp_path / "library").items())
    rng.shuffle(plans)
    write_safetensors(tmp_path / "ours", canonical_order(dict(plans)), metadata or {})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()


def test_canonical_order_knows_every_dtype(tmp_path: Path) -> None:
    assert LIBRARY_DTYPES.keys() == safetensors_file.DTYPE_SIZES.keys()
    tensors = {name: torch.ones(1).to(dtype) for name, dtype in LIBRARY_DTYPES.items()}
    safetensors.torch.save_file(tensors, tmp_path / "library")
    in_file = copied(tmp_path / "library")
    assert list(canonical_order(dict(reversed(in_file.items())))) == list(in_file)


def test_a_canonical_cast_file_is_the_librarys_own(mixed: Path, tmp_path: Path) -> None:
    plans = {
        name: TensorPlan(target_dtype(t.dtype, "BF16"), t.shape, (t,)) for name, t in read_header(mixed).tensors.items()
    }
    write_safetensors(tmp_path / "ours", canonical_order(plans), {"format": "pt"})
    source = safetensors.torch.load_file(mixed)
    cast = {name: t.bfloat16() if t.is_floating_point() else t for name, t in source.items()}
    safetensors.torch.save_file(cast, tmp_path / "library", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()


def test_an_empty_file_is_the_librarys_own(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "ours", {}, {})
    assert (tmp_path / "ours").read_bytes() == safetensors.torch.save({})


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
    "duplicate key": (raw(b'{"x":' + json.dumps(entry([], 0, 0)).encode() + b',"x":1}'), "'x' stands twice"),
    "list as dtype": (raw({"x": entry([1], 0, 4) | {"dtype": ["F32"]}}, b"\0" * 4), "is no name"),
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
    if any(tensor.dtype not in safetensors_file.DTYPE_BITS for tensor in ours.tensors.values()):
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
