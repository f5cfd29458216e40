"""GGUF files of prior and decoder: gguf-py judges bytes, diffusers loads files, bad files get one clear line."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from diffusers import GGUFQuantizationConfig, StableCascadeUNet
from diffusers.loaders.single_file_utils import convert_stable_cascade_unet_single_file_to_diffusers as renamed
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file

from cascadekit import convert, export, inspect
from cascadekit.converters.checkpoints.component import Component, Problems
from cascadekit.converters.checkpoints.plan_output import OutputOptions, plan_output
from cascadekit.parity.checkpoints.compare_tensors import compare_checkpoints
from cascadekit.parity.reference.loading import read_tensor
from cascadekit.schemas.block_types import BLOCK_TYPES, WRITTEN
from cascadekit.schemas.config_json import to_json
from cascadekit.schemas.errors import CheckpointError, ConversionError, UsageError
from cascadekit.schemas.layouts import Layout
from cascadekit.schemas.stages import PRESETS, Stage, UNetConfig, Variant
from cascadekit.schemas.tensors import expected_tensors
from cascadekit.storage.gguf_blocks import pack, unpack
from cascadekit.storage.safetensors_reader import TensorRange
from helpers.unets import DECODER, ODD_PRIOR, PRIOR

MODELS = {"prior": PRIOR, "odd prior": ODD_PRIOR, "decoder": DECODER}


def kind(name: str) -> GGMLQuantizationType:
    return GGMLQuantizationType[name]


def numbers(rows: int = 24, columns: int = 1024) -> np.ndarray:
    """Normal numbers; some blocks are zero, constant, of one sign, tiny, or have one large value."""
    x = np.random.default_rng(3).standard_normal((rows, columns)).astype(np.float32) * 0.02
    x[0, :256], x[1, :256], x[2, :256] = 0, 0.5, -0.1
    x[3], x[4] = np.abs(x[3]), -np.abs(x[4])
    x[5] *= 1e-6
    x[6, ::100] = 3
    return x


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_any_bytes_unpack_to_what_gguf_makes_of_them(name: str) -> None:
    block = BLOCK_TYPES[name]
    assert gguf.GGML_QUANT_SIZES[kind(name)] == (block.values, block.nbytes)
    data = np.random.default_rng(0).integers(0, 256, (33, block.nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = dequantize(data, kind(name)).reshape(-1)
    np.testing.assert_array_equal(unpack(data.reshape(-1), name), expected)


@pytest.mark.parametrize("name", [name for name in WRITTEN if not name.endswith("K")])
def test_packed_bytes_are_those_of_gguf(name: str) -> None:
    with np.errstate(all="ignore"):
        expected = quantize(numbers(), kind(name))
    np.testing.assert_array_equal(pack(numbers().reshape(-1), name), expected.reshape(-1))


@pytest.mark.parametrize("name", WRITTEN)
def test_the_error_is_the_one_of_the_table(name: str) -> None:
    x = numbers()
    unpacked = dequantize(pack(x.reshape(-1), name).reshape(len(x), -1), kind(name))
    assert not unpacked[0, :256].any()
    usual = slice(8, None)
    error = np.sqrt(np.square(unpacked[usual] - x[usual]).mean() / np.square(x[usual]).mean())
    assert error == pytest.approx(BLOCK_TYPES[name].error, rel=0.05)


def search(x: np.ndarray, top: int, *, signed: bool) -> float:
    """The squared error of sub-blocks whose scale and minimum are the best of 400, in float64."""
    best = np.full(len(x), np.inf)
    low = x.min(axis=1, keepdims=True).clip(max=0) if not signed else np.zeros((len(x), 1))
    for stretch in np.linspace(0.6, 1.3, 400):
        if signed:
            peak = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)
            codes = np.rint(x / (-peak * stretch / top)).clip(-top, top - 1)
            terms = codes[:, :, None]
        else:
            codes = np.rint((x - low) / ((x.max(axis=1, keepdims=True) - low) * stretch / top)).clip(0, top)
            terms = np.stack([codes, np.ones_like(codes)], axis=2)
        solved = np.linalg.pinv(terms) @ x[:, :, None]
        best = np.minimum(best, np.square(x - (terms @ solved)[:, :, 0]).sum(axis=1))
    return float(best.sum())


@pytest.mark.parametrize(("name", "top", "size"), [("Q6_K", 32, 16), ("Q5_K", 31, 32), ("Q4_K", 15, 32)])
def test_k_blocks_are_near_the_best_scales(name: str, top: int, size: int) -> None:
    """Scales of the search are not rounded, ours have 6 or 8 bits. Measured: 5, 8 and 4% more error than the search."""
    x = np.random.default_rng(5).standard_normal((12, 256)).astype(np.float32)
    ours = np.square(unpack(pack(x.reshape(-1), name), name).reshape(x.shape) - x.astype(np.float64)).sum()
    best = search(x.reshape(-1, size).astype(np.float64), top, signed=name == "Q6_K")
    assert ours < best * 1.08**2


def model(folder: Path, config: UNetConfig, dtype: torch.dtype = torch.float32) -> StableCascadeUNet:
    """A network of diffusers with every parameter random, saved in `folder`."""
    torch.manual_seed(1)
    network = StableCascadeUNet.from_config(to_json(config)).eval()
    for parameter in network.parameters():
        parameter.data = torch.randn_like(parameter) * 0.05
    network.to(dtype).save_pretrained(folder)
    return network.float()


def inputs(config: UNetConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    shared = {"timestep_ratio": torch.tensor([0.3, 0.9]), "clip_text_pooled": normal(2, 1, 20)}
    if config.stage is Stage.PRIOR:
        images = {"clip_text": normal(2, 7, 24), "clip_img": normal(2, 1, config.clip_image_in_channels or 0)}
        return {"sample": normal(2, config.in_channels, 14, 22), **images, **shared}
    return {"sample": normal(2, 4, 18, 26), "effnet": normal(2, 16, 3, 5), **shared}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).square().mean() / expected.square().mean()).sqrt())


def gguf_weights(path: Path) -> dict[str, torch.Tensor]:
    """The values of a file as gguf-py reads and unpacks them."""
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for t in tensors}


@pytest.mark.parametrize("quantize", [None, "q8_0", "q4_k"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_diffusers_runs_the_file(tmp_path: Path, name: str, quantize: str | None) -> None:
    config = MODELS[name]
    source = model(tmp_path / "model", config, torch.bfloat16)
    path = tmp_path / "weights.gguf"
    convert(tmp_path / "model", path, "gguf", quantize=quantize)
    settings = GGUFQuantizationConfig(compute_dtype=torch.float32)
    loaded = StableCascadeUNet.from_single_file(str(path), config=str(tmp_path / "model"), quantization_config=settings)
    exact = StableCascadeUNet.from_config(to_json(config)).eval()
    exact.load_state_dict(renamed(gguf_weights(path)))
    found, unpacked, expected = (net(**inputs(config)).sample for net in (loaded, exact, source))
    assert relative(found, unpacked) < 4e-3  # diffusers unpacks in float16
    if quantize is None:
        assert torch.equal(unpacked, expected)
    assert relative(unpacked, expected) < {None: 1e-6, "q8_0": 0.015, "q4_k": 0.18}[quantize]


@pytest.mark.parametrize("quantize", WRITTEN)
def test_every_layout_and_dtype_gets_the_values_of_gguf(original: Path, tmp_path: Path, quantize: str) -> None:
    convert(original, tmp_path / "gguf", "gguf", quantize=quantize)
    for stage in ("stage_b", "stage_c"):
        path = tmp_path / "gguf" / f"{stage}-{quantize}.gguf"
        worth = gguf_weights(path)
        for dtype, cast in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            convert(path, tmp_path / f"{dtype}.safetensors", "original", dtype=dtype, force=True)
            found = load_file(tmp_path / f"{dtype}.safetensors")
            assert found.keys() == worth.keys()
            assert all(torch.equal(found[name], worth[name].to(cast)) for name in worth)
        convert(path, tmp_path / "model", "diffusers", dtype="fp32", force=True)
        assert compare_checkpoints(inspect(path), inspect(tmp_path / "model"))
        again = tmp_path / f"{stage}.gguf"
        convert(path, again, "gguf")
        for tensor, copy in zip(gguf.GGUFReader(path).tensors, gguf.GGUFReader(again).tensors, strict=True):
            assert (tensor.name, tensor.tensor_type) == (copy.name, copy.tensor_type)
            np.testing.assert_array_equal(tensor.data, copy.data)


def test_unquantised_files_keep_every_value(original: Path, tmp_path: Path) -> None:
    """BF16 vectors and convolutions become F32, as diffusers takes BF16 for the weights of Linears alone."""
    convert(original / "stage_c.safetensors", tmp_path / "c.safetensors", "split", dtype="bf16")
    convert(tmp_path / "c.safetensors", tmp_path / "c.gguf", "gguf")
    kinds = {t.name: (t.tensor_type.name, len(t.shape)) for t in gguf.GGUFReader(tmp_path / "c.gguf").tensors}
    assert {kind == "BF16" for kind, axes in kinds.values() if axes == 2} == {True}
    assert {kind for kind, axes in kinds.values() if axes != 2} == {"F32"}
    convert(tmp_path / "c.gguf", tmp_path / "back.safetensors", "original", dtype="fp32")
    convert(tmp_path / "c.safetensors", tmp_path / "there.safetensors", "original", dtype="fp32")
    found, expected = load_file(tmp_path / "back.safetensors"), load_file(tmp_path / "there.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("variant", [Variant.FULL, Variant.LITE])
@pytest.mark.parametrize("stage", [Stage.PRIOR, Stage.DECODER])
def test_the_released_sizes_are_recognised_and_fit(stage: Stage, variant: Variant) -> None:
    """diffusers recognises the files by the shapes that gguf-py gives it: those of bytes, where blocks are."""
    config = PRESETS[stage, variant]
    size = {name: int(np.prod(shape)) for name, shape in expected_tensors(config).items()}
    tensors = {n: TensorRange(Path("x"), "BF16", s, 0, 2 * size[n]) for n, s in expected_tensors(config).items()}
    component = Component(Path("x"), stage, Layout.DIFFUSERS, config, tensors, {}, Problems())
    for wanted, bits in (("Q8_0", 11), ("Q4_K", 8)):
        (file,) = plan_output({stage: component}, OutputOptions(Layout.GGUF, quantize=wanted)).files
        assert file.nbytes * 8 < sum(size.values()) * bits
        shapes = {}
        for name, plan in file.tensors.items():
            block = BLOCK_TYPES.get(plan.dtype)
            columns = plan.shape[-1] // block.values * block.nbytes if block else plan.shape[-1]
            shapes[name] = torch.empty((*plan.shape[:-1], columns), device="meta")
        letter, lite = "c" if stage is Stage.PRIOR else "b", "_lite" if variant is Variant.LITE else ""
        assert infer_diffusers_model_type(shapes) == f"stable_cascade_stage_{letter}{lite}"


def test_metadata_and_inspection(original: Path, tmp_path: Path) -> None:
    tensors = load_file(original / "stage_c.safetensors")
    save_file(tensors, tmp_path / "c.safetensors", {"modelspec.title": "Tëst", "modelspec.license": "mine"})
    convert(tmp_path / "c.safetensors", tmp_path / "c.gguf", "gguf", quantize="Q5_K")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "c.gguf").fields.items()}
    assert fields["general.architecture"] == "stable_cascade"
    assert fields["general.name"] == fields["modelspec.title"] == "Tëst"
    assert (fields["general.quantization_version"], fields["general.file_type"]) == (
        gguf.GGML_QUANT_VERSION,
        gguf.LlamaFileType.MOSTLY_Q5_K_S,
    )
    from cascadekit.converters.contents import component_facts

    component = inspect(tmp_path / "c.gguf").components[Stage.PRIOR]
    facts = component_facts(component)
    assert facts["layout"] == "gguf"
    assert facts["licence"]["modelspec.license"] == "mine"
    expected = {"tensors": 4, "bits": 5.5, "error": BLOCK_TYPES["Q5_K"].error}
    assert facts["quantised"]["Q5_K"].items() >= expected.items()
    assert not component.problems


def test_a_bundle_holds_what_the_file_is_worth(original: Path, tmp_path: Path) -> None:
    convert(original / "stage_c.safetensors", tmp_path / "c.gguf", "gguf", quantize="q6_k")
    export(tmp_path / "c.gguf", tmp_path / "bundle")
    component = inspect(tmp_path / "c.gguf").components[Stage.PRIOR]
    for name, tensor in load_file(tmp_path / "bundle" / Stage.PRIOR / "weights.safetensors").items():
        assert torch.equal(tensor, read_tensor(component.tensors[name]))


def test_what_does_not_fit_is_refused(original: Path, tmp_path: Path) -> None:
    source = original / "stage_c.safetensors"
    calls: dict[str, Callable[[], Any]] = {
        'take to="gguf"': lambda: convert(source, tmp_path / "x", "original", quantize="q8_0"),
        "expected one of": lambda: convert(source, tmp_path / "x", "gguf", quantize="q3"),
        "does not fit": lambda: convert(source, tmp_path / "x.safetensors", "gguf"),
        "a place for prior": lambda: convert(original / "stage_a.safetensors", tmp_path / "x", "gguf"),
    }
    for message, call in calls.items():
        with pytest.raises(UsageError, match=message):
            call()
    convert(source, tmp_path / "c.gguf", "gguf", quantize="q8_0")
    with pytest.raises(ConversionError, match=r'quantised \(Q8_0\).*dtype="bf16"'):
        convert(tmp_path / "c.gguf", tmp_path / "x", "original")
    tensors = load_file(source)
    name = next(name for name in tensors if name.endswith("channelwise.0.weight"))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    with pytest.raises(ConversionError, match=rf"{name} holds NaN or infinities"):
        convert(tmp_path / "nan.safetensors", tmp_path / "x.gguf", "gguf", quantize="q4_k")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.gguf", "nan.safetensors"]


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def write(
    path: Path,
    *,
    shape: tuple[int, ...] = (64,),
    code: int = 0,
    offset: int = 0,
    version: int = 3,
    metadata: bytes = b"",
) -> Path:
    """A GGUF file of one tensor of 64 zeros in float32, its description as given; `metadata` has one entry or none."""
    head = b"GGUF" + struct.pack("<IQQ", version, 1, bool(metadata)) + metadata + text(b"clf.1.weight")
    head += struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], code, offset)
    path.write_bytes(head + bytes(-len(head) % 32) + bytes(256))
    return path


def original_shape(kind: int, *sizes: bytes) -> bytes:
    """The entry of metadata by which ComfyUI-GGUF gives a tensor its shape back, as an array of any type."""
    key = text(b"comfy.gguf.orig_shape.clf.1.weight")
    return key + struct.pack("<IIQ", 9, kind, len(sizes)) + b"".join(sizes)


BAD: dict[str, dict[str, Any]] = {
    r"orig_shape.clf.1.weight is \['8', '8'\], expected a shape of as many values as \[64\]": {
        "metadata": original_shape(8, text(b"8"), text(b"8"))
    },
    r"orig_shape.clf.1.weight is \[-8, -8\], expected": {"metadata": original_shape(5, *[struct.pack("<i", -8)] * 2)},
    r"orig_shape.clf.1.weight is \[8.0, 8.0\], expected": {"metadata": original_shape(6, *[struct.pack("<f", 8)] * 2)},
    "truncated: clf.1.weight .F32 .65.. ends at byte 356, the file at 352": {"shape": (65,)},
    "clf.1.weight: unknown type 99, expected that of one of F32": {"code": 99},
    r"clf.1.weight: Q4_K has blocks of 256 values.*found shape \[2, 128\]": {"shape": (2, 128), "code": 12},
    "clf.1.weight: at byte 97, expected a multiple of 32": {"offset": 1},
    "version 1 is not supported, expected 2 or 3": {"version": 1},
    "version 3 in big-endian order is not supported": {"version": 3 << 24},
    "clf.1.weight: 5 axes, expected at most 4": {"shape": (1, 1, 1, 1, 64)},
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_file_gets_one_clear_line(tmp_path: Path, message: str) -> None:
    path = write(tmp_path / "x.gguf", **BAD[message])
    with pytest.raises(CheckpointError, match=message) as caught:
        inspect(path)
    assert str(path) in str(caught.value)
    assert "download or save the file again" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_cut_anywhere_is_refused(original: Path, tmp_path: Path) -> None:
    convert(original / "stage_c.safetensors", tmp_path / "c.gguf", "gguf", quantize="q8_0")
    data = (tmp_path / "c.gguf").read_bytes()
    for size in (4, 7, 20, 24, 40, 1000, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.gguf").write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="damaged GGUF file: truncated: "):
            inspect(tmp_path / "cut.gguf")


def test_types_that_are_not_read_are_named(original: Path, tmp_path: Path) -> None:
    """Such a file is sound: its types are listed as not supported."""
    writer = gguf.GGUFWriter(tmp_path / "c.gguf", "stable_cascade")
    tensors = load_file(original / "stage_c.safetensors")
    odd = next(name for name, tensor in tensors.items() if tensor.ndim == 2 and tensor.shape[1] == 256)
    for name, tensor in tensors.items():
        if name == odd:
            raw = np.zeros((tensor.shape[0], 66), np.uint8)
            writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType.IQ2_XXS)
        else:
            writer.add_tensor(name, tensor.numpy())
    for finish in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        finish()
    writer.close()
    problems = inspect(tmp_path / "c.gguf").components[Stage.PRIOR].problems
    assert problems.lines() == [f"dtype that is not supported yet (1): {odd} is IQ2_XXS"]
    assert "quantised in a way that is not supported" in problems.meaning()


def test_the_command(original: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from cascadekit.cli import main

    out = tmp_path / "c.gguf"
    args = ["convert", str(original / "stage_c.safetensors"), "-o", str(out), "--to", "gguf", "--quantize", "q8_0"]
    assert CliRunner().invoke(main, args).exit_code == 0
    shown = CliRunner().invoke(main, ["inspect", str(out)]).output
    assert "GGUF architecture stable_cascade, quantised: " in shown
    assert "Q8_0 (8.5 bits, error 0.5%)" in " ".join(shown.split())
    facts = json.loads(CliRunner().invoke(main, ["inspect", str(out), "--json"]).output)
    assert facts[0]["quantised"]["Q8_0"]["bits"] == 8.5
