"""Pickled checkpoints: tensors are found in the file without unpickling, and anything more is refused."""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cascadekit import convert, inspect
from cascadekit.converters.pickles import read_pickle
from cascadekit.converters.reference import read_tensor
from cascadekit.schemas.errors import CheckpointError
from cascadekit.schemas.stages import Stage


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
    for name, message in (("zip.pt", "more than tensors"), ("plain.pt", "before version 1.6")):
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
