"""Folders quantised as SDNQ does: its code gives the same codes, and diffusers loads the folder with its package."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cascadekit import convert, inspect
from cascadekit.converters.checkpoints.sdnq_types import quantised
from cascadekit.parity.reference.loading import read_tensor
from cascadekit.schemas.errors import ConversionError, UsageError
from cascadekit.schemas.quantization import candidates
from cascadekit.schemas.sdnq_formats import SDNQ_CHOICES, group_of
from cascadekit.schemas.stages import Stage
from cascadekit.schemas.tensors import expected_tensors
from helpers.quantised import SHAPES, linears, recorded

STAGES = (Stage.PRIOR, Stage.DECODER)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(("choice", "name"), [("SDNQ_INT8", "sdnq_int8"), ("SDNQ_FP8", "sdnq_float8")])
def test_codes_and_factors_are_those_that_sdnq_recorded(choice: str, name: str) -> None:
    stored, _, values = recorded(name)
    for key, layer in linears(torch.float32, tuple(key.removesuffix(".weight") for key in values)).items():
        module = key.replace("/", ".")
        rows, form = layer.weight.detach().numpy(), SDNQ_CHOICES[choice]
        codes = stored[f"{module}.weight"].view(torch.uint8).numpy()
        np.testing.assert_array_equal(quantised(rows, form, "codes").view(np.uint8).reshape(SHAPES[module]), codes)
        factors = quantised(rows, form, "scale").reshape(-1)
        np.testing.assert_array_equal(factors, stored[f"{module}.scale"].numpy().reshape(-1))


@pytest.mark.parametrize("choice", SDNQ_CHOICES)
def test_a_folder_is_written_and_read_back(original: Path, tmp_path: Path, choice: str) -> None:
    form = SDNQ_CHOICES[choice]
    sources = [original / "stage_b.safetensors", original / "stage_c.safetensors"]
    done = convert(sources, tmp_path / "model", "diffusers", quantize=choice.lower())
    exact, found = inspect(original).components, inspect(tmp_path / "model").components
    for stage in STAGES:
        config = json.loads((tmp_path / "model" / stage / "config.json").read_text())["quantization_config"]
        linears_of = candidates(stage, expected_tensors(exact[stage].config))
        assert not {f"{module}.weight" for module in linears_of} & {*config["modules_to_not_convert"]}
        assert not found[stage].problems
        assert found[stage].quantised[f"SDNQ {form.name}"].tensors == len(linears_of)
        for name, tensor in exact[stage].tensors.items():
            was, now = read_tensor(tensor), read_tensor(found[stage].tensors[name])
            module = name.removesuffix(".weight")
            if module not in linears_of:
                assert torch.equal(was, now)
                continue
            groups = was.reshape(-1, group_of(form, was.shape[1]))
            step = (groups.amax(1) - groups.amin(1) if form.zero else groups.abs().amax(1)) / form.top
            off = (now.reshape(groups.shape) - groups).abs()
            bound = step[:, None] * 0.5001 if form.stored != "F8_E4M3" else groups.abs() / 16 + step[:, None] * 2**-9
            assert bool((off <= bound + 1e-9).all())
    assert any("Linears in SDNQ's" in note for note in done.notes)


def test_a_matrix_with_outliers_stays_float(original: Path, tmp_path: Path) -> None:
    name, tensors = "down_blocks.0.0.channelwise.4.weight", load_file(original / "stage_c.safetensors")
    matrix = tensors[name]
    group, largest = group_of(SDNQ_CHOICES["SDNQ_UINT4"], matrix.shape[1]), 40 * matrix.abs().max()
    matrix[:, ::group], matrix[:, 1::group] = largest, -largest
    save_file(tensors, tmp_path / "c.safetensors")
    done = convert(tmp_path / "c.safetensors", tmp_path / "model", "diffusers", quantize="sdnq_uint4")
    assert any(re.search(r"in float: down_blocks\.0\.0\.channelwise\.4 \(error", note) for note in done.notes)
    config = json.loads((tmp_path / "model" / "prior" / "config.json").read_text())["quantization_config"]
    assert name in config["modules_to_not_convert"]
    assert torch.equal(read_tensor(inspect(tmp_path / "model").components[Stage.PRIOR].tensors[name]), matrix)


def test_what_cannot_be_written_is_named(original: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='has no such type; leave it out, or take to="diffusers"'):
        convert(original, tmp_path / "out", "split", quantize="sdnq_int8")
    tensors = load_file(original / "stage_c.safetensors")
    name = next(name for name in tensors if name.endswith("channelwise.4.weight"))
    tensors[name][1, 2] = torch.inf
    save_file(tensors, tmp_path / "c.safetensors")
    with pytest.raises(ConversionError, match=r"holds NaN or infinities, .*; write it as float"):
        convert(tmp_path / "c.safetensors", tmp_path / "out", "diffusers", quantize="sdnq_int8")
    assert not (tmp_path / "out").exists()


def test_a_gguf_file_becomes_codes_of_its_values(original: Path, tmp_path: Path) -> None:
    convert(original / "stage_c.safetensors", tmp_path / "c.gguf", "gguf", quantize="q8_0")
    convert(tmp_path / "c.gguf", tmp_path / "plain.safetensors", "split", dtype="fp32")
    for source in ("c.gguf", "plain.safetensors"):
        convert(tmp_path / source, tmp_path / source[0], "diffusers", quantize="sdnq_int8")
    found, expected = (load_file(tmp_path / folder / "prior" / WEIGHTS) for folder in "cp")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("choice", SDNQ_CHOICES)
def test_diffusers_loads_the_folder_with_sdnq(original: Path, tmp_path: Path, choice: str) -> None:
    """Every weight that the package dequantises is the one that we read, and the network computes."""
    os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")
    pytest.importorskip("sdnq", reason="pip install sdnq")
    from diffusers import StableCascadeUNet
    from sdnq.layers import SDNQLayer

    convert(original, tmp_path / "model", "diffusers", quantize=choice.lower())
    for stage in STAGES:
        network = StableCascadeUNet.from_pretrained(tmp_path / "model" / stage, torch_dtype=torch.float32)
        ours = inspect(tmp_path / "model").components[stage]
        layers = {name: module for name, module in network.named_modules() if isinstance(module, SDNQLayer)}
        assert len(layers) == ours.quantised[f"SDNQ {SDNQ_CHOICES[choice].name}"].tensors
        state = network.state_dict()
        for name, tensor in ours.tensors.items():
            module = name.removesuffix(".weight")
            if module in layers and name.endswith(".weight"):
                layer = layers[module]
                parts = {part: getattr(layer, part, None) for part in ("weight", "scale", "zero_point")}
                assert torch.equal(layer.sdnq_dequantizer(**parts, skip_compile=True), read_tensor(tensor))
            else:
                assert torch.equal(state[name], read_tensor(tensor))
