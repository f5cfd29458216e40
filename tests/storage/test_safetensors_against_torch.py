"""Files that are cast, transposed or put in canonical order, against what torch and the library write."""

import random
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from cascadekit.schemas.casts import target_dtype
from cascadekit.schemas.dtypes import DTYPE_SIZES
from cascadekit.storage import cast_ranges as computing
from cascadekit.storage.safetensors_plan import Counts, TensorPlan, canonical_order
from cascadekit.storage.safetensors_reader import read_header
from cascadekit.storage.safetensors_writer import write_safetensors
from helpers.safetensors_bytes import copied

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

CAST_BLOCKS = (1, 5, 64, 1 << 23)


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
    path.write_bytes(unaligned(safetensors_torch.save(tensors)))
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
    written, source = safetensors_torch.load_file(tmp_path / "out"), safetensors_torch.load_file(mixed)
    assert list(written) == list(source)
    for name, tensor in source.items():
        assert_same(written[name], tensor.to(FLOAT_TENSORS[wanted]) if tensor.is_floating_point() else tensor)
    assert sum(done) == sum(plan.nbytes for plan in plans.values()) == sum(t.nbytes for t in written.values())


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Dtype, shape and every bit."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert actual.flatten().view(torch.uint8).tolist() == expected.contiguous().flatten().view(torch.uint8).tolist()


def test_one_tensor_of_ranges_of_several_dtypes(mixed: Path, tmp_path: Path) -> None:
    tensors, source = read_header(mixed).tensors, safetensors_torch.load_file(mixed)
    names = [f"{dtype}.7x5" for dtype in FLOAT_TENSORS]
    cut = tensors["F32.7x5"].rows(2, 4, (2, 5))
    plan = TensorPlan("BF16", (30, 5), (*(tensors[name] for name in names), cut))
    write_safetensors(tmp_path / "out", {"all": plan, "steps": TensorPlan("I64", (), (tensors["steps"],))}, {})
    expected = torch.cat([*(source[name].bfloat16() for name in names), source["F32.7x5"][2:4].bfloat16()])
    written = safetensors_torch.load_file(tmp_path / "out")
    assert_same(written["all"], expected)
    assert written["steps"] == 7


@pytest.mark.parametrize("block", [1, 24, 100, 200, 1 << 23])
@pytest.mark.parametrize(("source", "target"), [("F32", "F32"), ("F32", "F16"), ("BF16", "F32"), ("I64", "I64")])
def test_transposing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, target: str, block: int) -> None:
    """Every shape between two tensors that are copied."""
    monkeypatch.setattr(computing, "CAST_BLOCK", block)
    kinds = FLOAT_TENSORS | {"I64": torch.int64}
    generator = torch.Generator().manual_seed(6)
    shapes = [(1, 1), (1, 9), (9, 1), (5, 7), (3, 40), (40, 3), (16, 16), (0, 4), (4, 0)]
    values = {str(shape): torch.randn(shape, generator=generator).mul(1000).to(kinds[source]) for shape in shapes}
    path = tmp_path / "in"
    copies = {f"before {name}": torch.zeros(3, dtype=kinds[source]) for name in values}
    path.write_bytes(
        unaligned(safetensors_torch.save(copies | {name: value.T.contiguous() for name, value in values.items()}))
    )
    tensors = read_header(path).tensors
    plans = {}
    for shape in shapes:
        before, name = f"before {shape}", str(shape)
        plans[before] = TensorPlan(source, (3,), (tensors[before],))
        plans[name] = TensorPlan(target, shape, (replace(tensors[name], shape=shape, transposed=True),))
    plans["after"] = TensorPlan(source, (3,), (tensors[before],))
    done: list[int] = []
    write_safetensors(tmp_path / "out", plans, {}, done.append)
    written = safetensors_torch.load_file(tmp_path / "out")
    for name, value in values.items():
        assert_same(written[name], value.to(kinds[target]))
        assert_same(written[f"before {name}"], copies[f"before {name}"])
    assert_same(written["after"], torch.zeros(3, dtype=kinds[source]))
    assert sum(done) == sum(plan.nbytes for plan in plans.values())


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
    safetensors_torch.save_file(tensors, tmp_path / "library", metadata)
    plans = list(copied(tmp_path / "library").items())
    rng.shuffle(plans)
    write_safetensors(tmp_path / "ours", canonical_order(dict(plans)), metadata or {})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()


def test_canonical_order_knows_every_dtype(tmp_path: Path) -> None:
    assert LIBRARY_DTYPES.keys() == DTYPE_SIZES.keys()
    tensors = {name: torch.ones(1).to(dtype) for name, dtype in LIBRARY_DTYPES.items()}
    safetensors_torch.save_file(tensors, tmp_path / "library")
    in_file = copied(tmp_path / "library")
    assert list(canonical_order(dict(reversed(in_file.items())))) == list(in_file)


def test_a_canonical_cast_file_is_the_librarys_own(mixed: Path, tmp_path: Path) -> None:
    plans = {
        name: TensorPlan(target_dtype(t.dtype, "BF16"), t.shape, (t,)) for name, t in read_header(mixed).tensors.items()
    }
    write_safetensors(tmp_path / "ours", canonical_order(plans), {"format": "pt"})
    source = safetensors_torch.load_file(mixed)
    cast = {name: t.bfloat16() if t.is_floating_point() else t for name, t in source.items()}
    safetensors_torch.save_file(cast, tmp_path / "library", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()


def test_an_empty_file_is_the_librarys_own(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "ours", {}, {})
    assert (tmp_path / "ours").read_bytes() == safetensors_torch.save({})
