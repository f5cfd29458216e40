"""Pickled checkpoints: tensors are found in the file without unpickling, and anything more is refused."""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cascadekit import convert, export, inspect
from cascadekit.converters.export.validate import validate
from cascadekit.parity.reference.loading import read_tensor
from cascadekit.schemas.errors import CheckpointError
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import open_bundle
from cascadekit.storage.pickles import read_pickle


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [False, True])
def test_values(original: Path, tmp_path: Path, dtype: torch.dtype, nested: bool) -> None:
    tensors = {
        n: t.to(dtype) if t.is_floating_point() else t for n, t in load_file(original / "stage_a.safetensors").items()
    }
    content: Any = {"state_dict": OrderedDict(tensors), "epoch": 3, "name": "x"} if nested else tensors
    torch.save(content, tmp_path / "stage_a.pt")
    convert([tmp_path / "stage_a.pt"], tmp_path / "out.safetensors", "original")
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_generator_and_its_average(original: Path, tmp_path: Path) -> None:
    tensors = load_file(original / "stage_c.safetensors")
    averaged = {name: tensor + 1 for name, tensor in tensors.items()}
    torch.save({"generator_ema": averaged, "generator": tensors}, tmp_path / "c.ckpt")
    component = inspect(tmp_path / "c.ckpt").components[Stage.PRIOR]
    assert torch.equal(read_tensor(component.tensors["clf.1.bias"]), tensors["clf.1.bias"])


def test_views_of_one_storage(tmp_path: Path) -> None:
    whole = torch.arange(24.0)
    torch.save({"b": whole[12:].reshape(3, 4), "a": whole[:12], "c": torch.ones(())}, tmp_path / "x.pt")
    header = read_pickle(tmp_path / "x.pt")
    assert torch.equal(read_tensor(header.tensors["a"]), whole[:12])
    assert torch.equal(read_tensor(header.tensors["b"]), whole[12:].reshape(3, 4))
    assert read_tensor(header.tensors["c"]).shape == ()


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (exec, ("raise SystemExit('this code must never run')",))


def test_code_is_never_run(tmp_path: Path) -> None:
    torch.save({"x": Evil()}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
    for name, message in (("zip.pt", "besides tensors"), ("plain.pt", "torch 1.6 or later")):
        with pytest.raises(CheckpointError, match=message):
            inspect(tmp_path / name)


def test_what_cannot_be_mapped_is_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.arange(6.0).reshape(2, 3).T}, tmp_path / "strided.pt")
    torch.save({"x": 1}, tmp_path / "empty.pt")
    torch.save({"x": torch.arange(1000.0)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "packed.pt", "w") as packed:
        for entry in good.infolist():
            packed.writestr(entry.filename, good.read(entry), zipfile.ZIP_DEFLATED)
    cut = (tmp_path / "good.pt").read_bytes()[:-500]
    (tmp_path / "cut.pt").write_bytes(cut)
    for name in ("strided.pt", "empty.pt", "packed.pt", "cut.pt"):
        with pytest.raises(CheckpointError, match=name):
            read_pickle(tmp_path / name)


# Content that torch's restricted unpickler takes


def test_tensors_beside_odd_ones_are_read(tmp_path: Path) -> None:
    good = torch.arange(6.0).reshape(2, 3)
    content = {
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(7),
        "parameter": torch.nn.Parameter(good),
        "again": good,
        "fp8": torch.ones(3).to(torch.float8_e4m3fn),
        "complex": torch.ones(2, dtype=torch.complex64),
        "list": [good + 1, {"deep": good + 2}],
        "epoch": 3,
    }
    torch.save(content, tmp_path / "x.pt")
    header = read_pickle(tmp_path / "x.pt")
    assert header.shapes["empty"] == (0, 4)
    expected = {"parameter": good, "again": good, "list.0": good + 1, "list.1.deep": good + 2}
    assert {name: read_tensor(header.tensors[name]).tolist() for name in expected} == {
        name: tensor.tolist() for name, tensor in expected.items()
    }
    assert (header.tensors["fp8"].dtype, header.tensors["complex"].dtype) == ("F8_E4M3", "C64")


@pytest.mark.parametrize("content", [{"e": torch.empty(0)}, {"e": torch.empty(0), "f": torch.empty(3, 0)}])
def test_only_empty_tensors(tmp_path: Path, content: dict[str, torch.Tensor]) -> None:
    torch.save(content, tmp_path / "x.pt")
    assert read_pickle(tmp_path / "x.pt").tensors.keys() == content.keys()


class Tagged(torch.Tensor):
    pass


ONES = torch.ones(4, 4)
ODD: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (lambda: ONES.to_sparse(), "x is sparse"),
    "csr": (lambda: ONES.to_sparse_csr(), "x is sparse"),
    "meta": (lambda: torch.empty(3, device="meta"), "x is without values"),
    "nested": (lambda: torch.nested.nested_tensor([ONES, ONES[:2]], layout=torch.strided), "x is nested"),
    "quantised": (lambda: torch.quantize_per_tensor(ONES, 0.1, 0, torch.qint8), "x is quantised"),
    "transposed": (lambda: torch.arange(6.0).reshape(2, 3).T, r"strides \[1, 3\]"),
    "every other": (lambda: torch.arange(8.0)[::2], r"strides \[2\]"),
    "expanded": (lambda: torch.ones(1).expand(5), r"strides \[0\]"),
    "conjugate": (lambda: torch.ones(2, dtype=torch.complex64).conj(), "conjugated, negated or not contiguous"),
    "numpy scalar": (lambda: np.float64(1.5), "numpy"),
    "subclass": (lambda: torch.ones(2).as_subclass(Tagged), "Tagged"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("odd", "message"), ODD.values(), ids=ODD)
def test_what_is_no_plain_tensor_is_refused_by_name(tmp_path: Path, odd: Callable[[], Any], message: str) -> None:
    torch.save({"x": odd(), "t": ONES}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        read_pickle(tmp_path / "x.pt")
    assert "safetensors" in str(caught.value)
    assert "damaged" not in str(caught.value)
    assert "weights_only" not in str(caught.value)  # torch's own advice, which is to run the file's code


def test_shared_and_endless_dictionaries(tmp_path: Path) -> None:
    shared = {"t": ONES}
    torch.save({"model": shared, "ema": shared}, tmp_path / "twice.pt")
    assert read_pickle(tmp_path / "twice.pt").tensors.keys() == {"model.t", "ema.t"}
    many: dict[str, Any] = {"t": ONES}
    for _ in range(28):
        many = {"a": many, "b": many}
    endless: dict[str, Any] = {"t": ONES}
    endless["a"] = endless
    deep: dict[str, Any] = {"t": ONES}
    for _ in range(100):
        deep = {"a": deep}
    wide: dict[str, Any] = {"k" * 2000: ONES}
    limits = {"many": (many, "over 200000 entries"), "endless": (endless, "contains itself")}
    limits |= {"deep": (deep, "32 deep"), "wide": (wide, "too long")}
    for name, (content, message) in limits.items():
        torch.save(content, tmp_path / f"{name}.pt")
        with pytest.raises(CheckpointError, match=message):
            read_pickle(tmp_path / f"{name}.pt")


def test_names_that_become_one(tmp_path: Path) -> None:
    torch.save({"a": {"b": ONES}, "a.b": ONES}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"two tensors are called a\.b"):
        read_pickle(tmp_path / "x.pt")


# Archives


def rewritten(path: Path, change: Any) -> None:
    """The archive at `path` with what `change` writes into it, given the old and the new one."""
    old = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w") as new:
        change(old, new)


def copied(old: zipfile.ZipFile, new: zipfile.ZipFile, but: str = "none") -> None:
    for entry in old.infolist():
        if not entry.filename.endswith(but):
            new.writestr(entry.filename, old.read(entry))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_are_looked_at_before_they_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("loaded"))

    def packed(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
        copied(old, new, "data.pkl")
        new.writestr("x/data.pkl", bytes(10_000_000), zipfile.ZIP_DEFLATED)

    def large(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
        copied(old, new, "data.pkl")
        new.writestr("x/data.pkl", bytes(10_000_000))

    def twice(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
        copied(old, new)
        new.writestr("archive/data/0", bytes(64))

    def two_roots(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
        copied(old, new)
        new.writestr("y/data.pkl", b"")

    def no_pickle(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
        copied(old, new, "data.pkl")

    def crowded(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
        copied(old, new)
        for number in range(400):
            new.writestr(f"{number}" + "n" * 60_000, b"")

    changes = {"compressed": packed, "at most 8388608": large, "have one name": twice, "2 data.pkl": two_roots}
    changes |= {"0 data.pkl": no_pickle, "zip directory has": crowded}
    for message, change in changes.items():
        buffer = io.BytesIO()
        torch.serialization.save({"x": ONES}, buffer)
        path = tmp_path / "x.pt"
        path.write_bytes(buffer.getvalue())
        rewritten(path, change)
        with pytest.raises(CheckpointError, match=message):
            read_pickle(path)


def test_the_record_of_large_archives_counts(tmp_path: Path) -> None:
    """A size of the directory that stands only in the zip64 record is found there."""
    torch.save({"x": ONES}, tmp_path / "x.pt")
    content = (tmp_path / "x.pt").read_bytes()
    at = content.rfind(b"PK\x05\x06")
    large = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 1, 1, 1 << 33, 0)
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, at, 1)
    (tmp_path / "x.pt").write_bytes(content[:at] + large + locator + content[at:])
    with pytest.raises(CheckpointError, match="zip directory has 8589934592 bytes"):
        read_pickle(tmp_path / "x.pt")


def test_entries_that_no_tensor_uses_do_not_shift_the_others(tmp_path: Path) -> None:
    """torch writes entries in the order of the pickle; another program may put one before them."""
    torch.save({"x": torch.arange(100.0)}, tmp_path / "x.pt")
    content, name = (tmp_path / "x.pt").read_bytes(), "x"
    old = zipfile.ZipFile(io.BytesIO(content))
    with zipfile.ZipFile(tmp_path / "y.pt", "w") as new:
        new.writestr(f"{name}/data/7", bytes(400))
        copied(old, new)
    header = read_pickle(tmp_path / "y.pt")
    assert read_tensor(header.tensors["x"]).tolist() == list(range(100))


@pytest.mark.parametrize("suffix", [".pkl", ".safetensors", "", ".CKPT", ".bin"])
def test_the_name_says_nothing(original: Path, tmp_path: Path, suffix: str) -> None:
    tensors = load_file(original / "stage_a.safetensors")
    torch.save(tensors, tmp_path / f"pickled{suffix}")
    (tmp_path / f"safe{suffix}").write_bytes((original / "stage_a.safetensors").read_bytes())
    for name in ("pickled", "safe"):
        assert Stage.VQGAN in inspect(tmp_path / f"{name}{suffix}").components
        manifest = export(tmp_path / f"{name}{suffix}", tmp_path / f"{name}-bundle", weights="auto")
        placed = manifest.stages[Stage.VQGAN]
        assert name != "pickled" or placed.weights == "copy"
        assert validate(open_bundle(tmp_path / f"{name}-bundle"))


def test_files_of_old_torch_are_refused_with_advice(tmp_path: Path) -> None:
    torch.save({"x": ONES}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"torch 1\.6 or later.*save its tensors as safetensors"):
        inspect(tmp_path / "old.pt")
