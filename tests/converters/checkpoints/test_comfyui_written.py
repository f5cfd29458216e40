"""Files quantised for ComfyUI: comfy-kitchen's eager backend gives the same codes, and reads what we say they hold."""

from io import BytesIO
from pathlib import Path
from typing import Any

import comfy_kitchen.backends.eager.quantization as kitchen
import numpy as np
import pytest
import torch
from ml_dtypes import float4_e2m1fn, float8_e4m3fn, float8_e5m2
from safetensors.torch import load_file, save_file

from cascadekit import convert, inspect
from cascadekit.converters.checkpoints.comfyui_types import ScaledTypes, normal_error
from cascadekit.converters.checkpoints.identify import identify_all
from cascadekit.schemas.comfy_formats import CHOICES, FORMATS
from cascadekit.schemas.errors import ConversionError, UsageError
from cascadekit.schemas.stages import Stage
from cascadekit.storage.safetensors_reader import header_in
from cascadekit.storage.scaled_codes import codes, group_factors, overall_factor, rounded, tiled
from helpers.comfy_files import opened

RECOGNISED = "down_blocks.1.0.channelwise.0"  # comfy/model_detection.py reads the columns of this weight


def matrix(rows: int = 160, columns: int = 1344) -> torch.Tensor:
    """Normal numbers; some groups are zero, tiny, equal, or have one large value. Rows are no whole tile, and more
    than a step of ours has."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(4)) * 0.03
    x[0, :64], x[1, :64], x[2, :32] = 0, 0.25, 1e-9
    x[3, ::48] = 1.5
    return x


def theirs(kind: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, factor of all values, and factors of groups, as comfy-kitchen makes them."""
    largest, none = x.abs().max(), torch.zeros(0)
    if kind.startswith("float8"):
        dtype = getattr(torch, kind)
        scale = largest / torch.finfo(dtype).max
        return kitchen.quantize_per_tensor_fp8(x, scale, dtype), scale, none
    if kind == "int8_tensorwise":
        return *kitchen.quantize_int8_tensorwise(x), none
    if kind == "mxfp8":
        stored, factors = kitchen.quantize_mxfp8(x)
        return stored, torch.tensor(1.0), factors
    overall = largest / (448 * 6)
    stored, factors = kitchen.quantize_nvfp4(x, overall)
    return stored, overall, factors


@pytest.mark.parametrize("kind", FORMATS)
def test_codes_and_factors_are_those_of_comfy_kitchen(kind: str) -> None:
    x = matrix()
    stored, overall, factors = theirs(kind, x)
    ours = overall_factor(kind, np.float32(x.abs().max()))
    assert ours == overall.numpy()
    np.testing.assert_array_equal(codes(x.numpy(), kind, ours), stored.view(torch.uint8).numpy())
    if factors.numel():
        found = tiled(group_factors(x.numpy(), kind, ours))
        np.testing.assert_array_equal(found, factors.view(torch.uint8).numpy().reshape(found.shape))


@pytest.mark.parametrize(("dtype", "top"), [(float8_e4m3fn, 448), (float8_e5m2, 57344), (float4_e2m1fn, 6)])
def test_values_are_rounded_as_ml_dtypes_does(dtype: Any, top: float) -> None:
    """Every sign, exponent and leading bit, with ties and with the numbers beside them."""
    bits = np.arange(1 << 16, dtype="<u4") << 16 | np.array([[0], [1], [0x7FFF], [0x8000], [0xFFFF]], "<u4")
    values = bits.view("<f4")
    with np.errstate(invalid="ignore"):
        expected = values.clip(-top, top).astype(dtype).view(np.uint8)
    np.testing.assert_array_equal(rounded(values, dtype, top), expected)
    if top > 6:  # which torch has, too
        numbers = ~np.isnan(values)
        theirs = torch.from_numpy(values[numbers].clip(-top, top)).to(getattr(torch, np.dtype(dtype).name))
        np.testing.assert_array_equal(rounded(values[numbers], dtype, top), theirs.view(torch.uint8).numpy())


@pytest.mark.parametrize("choice", CHOICES)
def test_comfy_kitchen_reads_what_we_read(original: Path, tmp_path: Path, choice: str) -> None:
    """Every weight: quantised ones as comfy-kitchen dequantises them, others unchanged."""
    convert(original, tmp_path / "comfy", "comfyui", quantize=choice.lower(), dtype="fp32")
    for letter in "bc":
        path = tmp_path / "comfy" / f"stable_cascade_stage_{letter}.safetensors"
        convert(
            original / f"stage_{letter}.safetensors", tmp_path / "exact.safetensors", "split", dtype="fp32", force=True
        )
        exact = load_file(tmp_path / "exact.safetensors")
        weights = opened(path, "model.diffusion_model.")
        convert(path, tmp_path / "back", "split", dtype="fp32", force=True)
        back = load_file(tmp_path / "back" / f"stage_{letter}.safetensors")
        assert back.keys() == exact.keys()
        for name, tensor in back.items():
            layer = name.removesuffix(".weight")
            assert torch.equal(tensor, weights[layer].dequantize() if layer in weights else exact[name])
        assert len(weights) > 20
        assert (RECOGNISED in weights) == (letter == "c")
        assert all(layer.endswith((".0", ".4", ".1", "to_q", "to_k", "to_v", "out_proj")) for layer in weights)
        worst = max(
            float((weights[layer].dequantize() - exact[f"{layer}.weight"]).norm() / exact[f"{layer}.weight"].norm())
            for layer in weights
        )
        assert worst <= 2 * normal_error(CHOICES[choice], 64) * 1.2


def test_the_split_layout_and_order_of_the_library(original: Path, tmp_path: Path) -> None:
    """One file for the loader of diffusion models; the canonical order changes no value; a second run no byte."""
    source = original / "stage_c.safetensors"
    for name, canonical in (("a", False), ("b", True), ("c", False)):
        convert(source, tmp_path / f"{name}.safetensors", "split", quantize="nvfp4", canonical=canonical)
    first, other = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert all(
        torch.equal(first[name].view(torch.uint8), other[name].view(torch.uint8)) for name in first if first[name].ndim
    )
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()
    assert opened(tmp_path / "a.safetensors").keys() == opened(tmp_path / "b.safetensors").keys()
    assert any("attention.attn.to_q" in layer for layer in opened(tmp_path / "a.safetensors"))


def test_quantised_sources_become_quantised(original: Path, tmp_path: Path) -> None:
    """From GGUF blocks and from nvfp4 to mxfp8: the values are those that the source is worth."""
    source = original / "stage_c.safetensors"
    convert(source, tmp_path / "c.gguf", "gguf", quantize="q8_0")
    convert(source, tmp_path / "four.safetensors", "split", quantize="nvfp4")
    for name in ("c.gguf", "four.safetensors"):
        convert(tmp_path / name, tmp_path / "plain.safetensors", "split", dtype="fp32", force=True)
        for dtype, path in ((None, "plain.safetensors"), ("fp32", name)):
            convert(
                tmp_path / path, tmp_path / f"{dtype}.safetensors", "split", quantize="mxfp8", dtype=dtype, force=True
            )
        found, expected = (load_file(tmp_path / f"{dtype}.safetensors") for dtype in ("fp32", None))
        assert all(
            torch.equal(found[key].view(torch.uint8), expected[key].view(torch.uint8))
            for key in expected
            if expected[key].ndim
        )


def changed(original: Path, path: Path, value: float) -> str:
    tensors = load_file(original / "stage_c.safetensors")
    name = next(name for name in tensors if name.endswith("channelwise.0.weight"))
    tensors[name][1, 2] = value
    save_file(tensors, path)
    return name


def test_a_matrix_with_an_outlier_stays_float(original: Path, tmp_path: Path) -> None:
    """One value of 1000 leaves int8 no code for the others; mxfp8 has a factor for each group."""
    name = changed(original, tmp_path / "odd.safetensors", 1000.0)
    done = convert(tmp_path / "odd.safetensors", tmp_path / "int8.safetensors", "split", quantize="int8")
    assert any(name.removesuffix(".weight") in note and "tolerated" in note for note in done.notes)
    assert torch.equal(load_file(tmp_path / "int8.safetensors")[name], load_file(tmp_path / "odd.safetensors")[name])
    component = inspect(tmp_path / "odd.safetensors").components[Stage.PRIOR]
    assert name.removesuffix(".weight") in ScaledTypes.of(component, "MXFP8").factors


def test_what_does_not_fit_is_refused(original: Path, tmp_path: Path) -> None:
    name = changed(original, tmp_path / "nan.safetensors", float("nan"))
    with pytest.raises(ConversionError, match=f"nan.safetensors: {name} holds NaN or infinities"):
        convert(tmp_path / "nan.safetensors", tmp_path / "x.safetensors", "split", quantize="fp8")
    for layout, quantize in (("original", "fp8"), ("gguf", "nvfp4"), ("diffusers", "int8")):
        with pytest.raises(UsageError, match='has no such type; leave it out, or take to="comfyui" or to="split"'):
            convert(original, tmp_path / "x", layout, quantize=quantize)
    with pytest.raises(UsageError, match='the comfyui layout has no such type; leave it out, or take to="gguf"'):
        convert(original, tmp_path / "x", "comfyui", quantize="q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["nan.safetensors"]


@pytest.mark.parametrize("choice", CHOICES)
def test_the_header_alone_tells_the_format(original: Path, tmp_path: Path, choice: str) -> None:
    """As `inspect hf://` sees a file that is described in tensors: the JSON in them is not transferred."""
    path = tmp_path / "c.safetensors"
    convert(original / "stage_c.safetensors", path, "split", quantize=choice)
    save_file(load_file(path), path)
    content = path.read_bytes()
    local, remote = inspect(path), identify_all(header_in(BytesIO(content), Path("hf://a/b/c"), len(content)))
    assert remote.components[0].dtypes == local.components[Stage.PRIOR].dtypes
    assert not remote.components[0].problems
    assert any(f"weights in {CHOICES[choice]} have scales" in note for note in remote.notes)


def test_codes_are_not_called_copies(original: Path, tmp_path: Path) -> None:
    (line,) = convert(original / "stage_c.safetensors", tmp_path / "c.safetensors", "split", quantize="fp8").details
    tensors = load_file(tmp_path / "c.safetensors")
    codes = sum(tensor.dtype == torch.float8_e4m3fn for tensor in tensors.values())
    assert f", {codes} calculated (F8_E4M3)" in line
    assert "copied (F8_E4M3)" not in line
    assert line.endswith(", from stage_c.safetensors")
