"""fp8 checkpoints, plain and scaled as ComfyUI writes them: read, kept, cast, compared and exported; torch judges."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cascadekit import convert, export, inspect
from cascadekit.parity.checkpoints.compare_tensors import compare_checkpoints
from cascadekit.parity.reference.loading import read_tensor
from cascadekit.schemas.dtypes import FLOATS, FP8
from cascadekit.schemas.errors import CascadeError, ConversionError, LayoutError
from cascadekit.schemas.passport_keys import KEY
from cascadekit.schemas.precision import Precision
from cascadekit.schemas.stages import Stage
from cascadekit.storage.cast import cast_counted

TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
KINDS = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
CODES = torch.arange(256, dtype=torch.int32).to(torch.uint8)
PREFIX = "model.diffusion_model."


def bits(tensor: torch.Tensor) -> list[int]:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()]).flatten().tolist()


def as_torch(values: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(values.view(f"i{values.itemsize}").copy()).view(TORCH[dtype])


@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("source", FP8)
def test_every_code_is_what_torch_makes_of_it(source: str, target: str) -> None:
    expected = CODES.view(KINDS[source]).to(TORCH[target])
    found = cast_counted(CODES.numpy().tobytes(), source, target)
    ours = as_torch(found.values, target)
    nan = expected.isnan()
    assert bits(ours[~nan]) == bits(expected[~nan])
    assert ours.isnan().tolist() == nan.tolist()
    assert target == "BF16" or bits(ours) == bits(expected)  # torch gives every NaN one pattern there
    assert (found.overflow, found.not_finite) == (0, int((~CODES.view(KINDS[source]).float().isfinite()).sum()))


@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("source", FP8)
@pytest.mark.parametrize("scale", [0.0123, 1.0, -3.7, 3e-8, 1e36, 1e38])
def test_a_scale_is_multiplied_in_float32_and_rounded_once(source: str, target: str, scale: float) -> None:
    stored = CODES.view(KINDS[source])
    expected = (stored.float() * torch.tensor(scale)).to(TORCH[target])
    found = cast_counted(CODES.numpy().tobytes(), source, target, np.float32(scale))
    nan = expected.isnan()
    assert bits(as_torch(found.values, target)[~nan]) == bits(expected[~nan])
    assert found.overflow == int((expected.isinf() & stored.float().isfinite()).sum())


def weights(original: Path) -> dict[str, torch.Tensor]:
    return load_file(original / "stage_c.safetensors")


def plain(original: Path, path: Path, dtype: torch.dtype = torch.float8_e4m3fn) -> dict[str, torch.Tensor]:
    """Stage C in fp8 at `path`, and what its tensors are worth."""
    stored = {name: tensor.to(dtype) for name, tensor in weights(original).items()}
    save_file(stored, path)
    return {name: tensor.float() for name, tensor in stored.items()}


def scaled(original: Path, path: Path, marker: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Stage C with its matrices scaled to fp8, as ComfyUI loads it from a file of the whole checkpoint."""
    stored, worth = {}, {}
    for name, tensor in weights(original).items():
        if tensor.ndim == 2 and name.endswith(".weight"):
            scale = (tensor.abs().max() / 448).reshape(())
            stored[PREFIX + name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[PREFIX + name.removesuffix("weight") + "scale_weight"] = scale
            stored[PREFIX + name.removesuffix("weight") + "scale_input"] = torch.tensor(1.0)
            worth[name] = stored[PREFIX + name].float() * scale
        else:
            stored[PREFIX + name] = worth[name] = tensor
    if marker is not None:
        stored[PREFIX + "scaled_fp8"] = marker
    save_file(stored, path)
    return worth


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", KINDS.values())
def test_a_plain_file_is_kept_or_cast(original: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    worth = plain(original, tmp_path / "stage_c.safetensors", dtype)
    convert([tmp_path / "stage_c.safetensors"], tmp_path / "kept.safetensors", "original")
    kept = load_file(tmp_path / "kept.safetensors")
    assert all(tensor.dtype == dtype for tensor in kept.values())
    same({name: tensor.float() for name, tensor in kept.items()}, worth)
    for name in ("BF16", "F16", "F32"):
        convert([tmp_path / "stage_c.safetensors"], tmp_path / f"{name}.safetensors", "original", dtype=name)
        same(load_file(tmp_path / f"{name}.safetensors"), {n: t.to(TORCH[name]) for n, t in worth.items()})


MARKERS = {
    "fp8": torch.zeros(0, dtype=torch.float8_e4m3fn),
    "fp8 of two": torch.zeros(2, dtype=torch.float8_e4m3fn),
    "float32": torch.zeros(0),
    "e5m2": torch.zeros(0, dtype=torch.float8_e5m2),
    "none": None,
}


@pytest.mark.parametrize("marker", MARKERS.values(), ids=MARKERS)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_scaled_file_is_cast(original: Path, tmp_path: Path, dtype: str, marker: torch.Tensor | None) -> None:
    worth = scaled(original, tmp_path / "c.safetensors", marker)
    done = convert([tmp_path / "c.safetensors"], tmp_path / "out.safetensors", "original", dtype=dtype)
    same(load_file(tmp_path / "out.safetensors"), {name: tensor.to(TORCH[dtype]) for name, tensor in worth.items()})
    assert any("weights in float8_e4m3fn have scales" in note for note in done.notes)
    assert any("scale_input" in note for note in done.notes)


def test_a_float_with_a_scale_is_not_called_a_copy(original: Path, tmp_path: Path) -> None:
    """ComfyUI multiplies by a scale whatever the dtype; the product is written, and the passport says so."""
    tensors = weights(original)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2 and name.endswith(".weight"))
    save_file(tensors | {f"{name.removesuffix('weight')}scale_weight": torch.tensor(2.0)}, tmp_path / "c.safetensors")
    (line,) = convert(tmp_path / "c.safetensors", tmp_path / "out.safetensors", "original").details
    assert ", 1 F32 with scales to F32" in line
    same(load_file(tmp_path / "out.safetensors"), tensors | {name: tensors[name] * 2})
    passport = inspect(tmp_path / "out.safetensors").components[Stage.PRIOR].metadata[KEY]
    assert json.loads(passport)["values"] == "calculated"


def test_a_scaled_file_without_a_dtype_is_refused_by_name(original: Path, tmp_path: Path) -> None:
    scaled(original, tmp_path / "c.safetensors", None)
    with pytest.raises(ConversionError, match=r'scaled fp8.*dtype="bf16"') as caught:
        convert([tmp_path / "c.safetensors"], tmp_path / "out.safetensors", "original")
    assert "damaged" not in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_what_is_not_supported_is_named(original: Path, tmp_path: Path) -> None:
    tensors = weights(original)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2 and name.endswith(".weight"))
    layer = name.removesuffix("weight")
    one = {name: tensors[name].to(torch.float8_e4m3fn)}
    odd: dict[str, dict[str, torch.Tensor]] = {
        "expected one number": one | {layer + "scale_weight": torch.ones(3, 1)},
    }
    for message, change in odd.items():
        save_file(tensors | change, tmp_path / "c.safetensors")
        with pytest.raises(LayoutError, match=message) as caught:
            inspect(tmp_path / "c.safetensors")
        assert "damaged" not in str(caught.value)
    save_file(tensors | one | {layer + "scale_weight": torch.tensor(torch.inf)}, tmp_path / "c.safetensors")
    with pytest.raises(CascadeError, match=r"scale at byte .* is inf"):
        convert([tmp_path / "c.safetensors"], tmp_path / "out.safetensors", "original", dtype="F32")


def test_comparing(original: Path, tmp_path: Path) -> None:
    """A file in fp8 equals its casts, and nothing else."""
    plain(original, tmp_path / "plain.safetensors")
    scaled(original, tmp_path / "scaled.safetensors", None)
    for name in ("plain", "scaled"):
        source = tmp_path / f"{name}.safetensors"
        for dtype in ("F32", "BF16"):
            cast = tmp_path / f"{name}-{dtype}.safetensors"
            convert([source], cast, "original", dtype=dtype)
            assert compare_checkpoints(inspect(cast), inspect(source))
            assert compare_checkpoints(inspect(source), inspect(cast))
        assert compare_checkpoints(inspect(source), inspect(source))
    assert not compare_checkpoints(inspect(tmp_path / "plain.safetensors"), inspect(tmp_path / "scaled.safetensors"))


@pytest.mark.parametrize("kind", ["plain", "scaled"])
def test_a_bundle_holds_what_the_file_is_worth(original: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "c.safetensors"
    worth = plain(original, path) if kind == "plain" else scaled(original, path, None)
    component = inspect(path).components[Stage.PRIOR]
    manifest = export(path, tmp_path / "bundle")
    stored = load_file(tmp_path / "bundle" / Stage.PRIOR / "weights.safetensors")
    assert manifest.stages[Stage.PRIOR].weights == "copy"
    for name, tensor in stored.items():
        if tensor.is_floating_point():
            assert tensor.dtype == (torch.bfloat16 if kind == "plain" else torch.float32)
            assert torch.equal(tensor.float(), read_tensor(component.tensors[name]))
    assert torch.equal(stored["clf.1.bias"].float(), worth["clf.1.bias"])


def test_new_dtypes_are_not_damage(original: Path, tmp_path: Path) -> None:
    tensors = weights(original)
    save_file(tensors | {"x": torch.zeros(4, dtype=torch.complex64)}, tmp_path / "c.safetensors")
    assert "x" in inspect(tmp_path / "c.safetensors").components[Stage.PRIOR].problems.unexpected
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name].to(torch.complex64)}, tmp_path / "c.safetensors")
    (line,) = inspect(tmp_path / "c.safetensors").components[Stage.PRIOR].problems.lines()
    assert "C64" in line
    assert "not supported yet" in line


def test_nan_in_a_cast_is_noted_and_in_a_copy_not_looked_for(original: Path, tmp_path: Path) -> None:
    tensors = weights(original)
    tensors["clf.1.bias"][:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    save_file(tensors, tmp_path / "stage_c.safetensors")
    for dtype in ("F16", "BF16"):
        done = convert([tmp_path / "stage_c.safetensors"], tmp_path / f"{dtype}.safetensors", "original", dtype=dtype)
        (note,) = [note for note in done.notes if "NaN" in note]
        assert f"{dtype}.safetensors: 3 values in 1 tensors were NaN or infinite" in note
        assert "clf.1.bias (3)" in note
    said: list[str] = []
    export(tmp_path / "stage_c.safetensors", tmp_path / "b", precision=Precision.BF16, say=said.append)
    assert any("prior/weights.safetensors: 3 values in 1 tensors were NaN or infinite" in text for text in said)
    copied = convert([tmp_path / "stage_c.safetensors"], tmp_path / "copy.safetensors", "original")
    assert not [note for note in copied.notes if "NaN" in note]
