"""The writer of safetensors files against literal bytes: copies, transposes, overflow, full disks, memory."""

import errno
import itertools
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from cascadekit.schemas.errors import ConversionError
from cascadekit.storage import cast_ranges as computing
from cascadekit.storage import file_ranges as copying
from cascadekit.storage.safetensors_plan import CalculatedRange, TensorPlan
from cascadekit.storage.safetensors_reader import read_header
from cascadekit.storage.safetensors_writer import new_safetensors, write_safetensors
from helpers.safetensors_bytes import copied


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


@settings(max_examples=300, deadline=None)
@given(rows=st.integers(0, 90), columns=st.integers(0, 90), limit=st.integers(1, 999))
def test_tiles_cover_a_matrix_once(rows: int, columns: int, limit: int) -> None:
    tiles = list(computing._tiles((rows, columns), limit))
    assert all(0 < len(down) * len(across) <= limit for down, across in tiles)
    assert sum(len(down) * len(across) for down, across in tiles) == rows * columns
    assert len({(down.start, across.start) for down, across in tiles}) == len(tiles)
    assert all(down.stop <= rows and across.stop <= columns for down, across in tiles)


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
        "out: 21 finite values become infinite: 6 (6 in F16), 5 (5 in F16), 4 (4 in F16), 3 (3 in F16), 2 (2 in F16), "
        '1 (1 in F16); try dtype="bf16", whose range is that of float32, or keep the infinities with '
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
        ("F32", "BF16", 1 << 28, (1 << 13, 1 << 13), False),
        ("BF16", "F32", 1 << 27, (1 << 13, 1 << 13), False),
        ("F8_E4M3", "BF16", 1 << 27, (1 << 13, 1 << 14), False),
        ("F32", "F16", 1 << 28, (1 << 13, 1 << 13), True),
        ("F32", "F32", 1 << 28, (2, 1 << 25), True),
        ("F32", "F32", 1 << 28, (1 << 25, 2), True),
    ],
)
def test_memory_does_not_grow_with_the_tensor(
    tmp_path: Path, dtype: str, target: str, size: int, shape: tuple[int, int], transposed: bool
) -> None:
    """A hole as one tensor, in a fresh process: source or output, or both, take 256 MiB."""
    hole = tmp_path / "hole"
    hole.touch()
    os.truncate(hole, size)
    command = [sys.executable, "-c", MEASURE, hole, tmp_path / "out", dtype, target, *map(str, shape), str(transposed)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after = map(int, run.stdout.split())
    assert after < 200, f"{after} MiB, {before} before the call"
    (tmp_path / "out").unlink()


def test_parts_may_be_calculated(two: Path, tmp_path: Path) -> None:
    """A tensor of a calculated part between two copied ones, and one that is calculated in two blocks."""
    x = read_header(two).tensors["x"]
    middle = CalculatedRange(8, lambda: [np.array([8, 9], "<f4")])
    blocks = CalculatedRange(6, lambda: iter([np.array([1, 2], "<u2"), np.array([[3]], "<u2")]))
    plans = {
        "mixed": TensorPlan("F32", (3, 2), (x.rows(0, 1, (1, 2)), middle, x.rows(2, 3, (1, 2)))),
        "made": TensorPlan("U16", (3,), (blocks,)),
    }
    done: list[int] = []
    write_safetensors(tmp_path / "out", plans, {}, done.append)
    loaded = safetensors.numpy.load_file(tmp_path / "out")
    assert loaded["mixed"].tolist() == [[0, 1], [8, 9], [4, 5]]
    assert loaded["made"].tolist() == [1, 2, 3]
    assert sum(done) == 30


def test_two_ranges_are_calculated_at_a_time(tmp_path: Path) -> None:
    """Each waits for another one. Never are there more than two, whose blocks are in memory."""
    pairs, lock, at_work, most = threading.Barrier(2, timeout=20), threading.Lock(), [0], [0]

    def blocks(value: int) -> Iterator[np.ndarray]:
        with lock:
            at_work[0] += 1
            most[0] = max(most[0], at_work[0])
        pairs.wait()
        yield np.full(3, value, "u1")
        with lock:
            at_work[0] -= 1
        pairs.wait()

    names = "abcdef"
    plans = {
        name: TensorPlan("U8", (3,), (CalculatedRange(3, partial(blocks, number)),))
        for number, name in enumerate(names)
    }
    done: list[int] = []
    write_safetensors(tmp_path / "out", plans, {}, done.append)
    loaded = safetensors.numpy.load_file(tmp_path / "out")
    assert {name: loaded[name].tolist() for name in names} == {name: [n] * 3 for n, name in enumerate(names)}
    assert (most, done) == ([2], [3] * 6)


def test_too_few_calculated_bytes_are_noticed(tmp_path: Path) -> None:
    plan = TensorPlan("U8", (4,), (CalculatedRange(4, lambda: [np.zeros(3, "u1")]),))
    with pytest.raises(ConversionError, match="x: 3 bytes were calculated instead of 4"):
        write_safetensors(tmp_path / "out", {"x": plan}, {})


def test_the_caller_may_write_in_any_order(tmp_path: Path) -> None:
    """Lines of a matrix column by column, the second tensor first; what is not written is zero."""
    plans = {"a": TensorPlan("U8", (2, 3), ()), "b": TensorPlan("F32", (2,), ())}
    with new_safetensors(tmp_path / "out", plans, {}) as out:
        out.write("b", np.array([5], "<f4"), 4)
        out.write_lines("a", np.array([[1], [2]], "u1"), 2, 3)
    loaded = safetensors.numpy.load_file(tmp_path / "out")
    assert loaded["a"].tolist() == [[0, 0, 1], [0, 0, 2]]
    assert loaded["b"].tolist() == [0, 5]
