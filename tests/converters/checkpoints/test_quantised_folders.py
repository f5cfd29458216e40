"""Folders that torchao, bitsandbytes and SDNQ quantised: every weight has the values that the program gives, bit for
bit; bad files get one clear line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cascadekit import convert, inspect
from cascadekit.parity.checkpoints.compare_tensors import compare_checkpoints
from cascadekit.parity.reference.loading import read_tensor
from cascadekit.schemas.code_types import bits_of, values_of
from cascadekit.schemas.errors import CascadeError
from cascadekit.schemas.passport_keys import KEY
from cascadekit.schemas.quantised_facts import ERRORS
from cascadekit.schemas.stages import Stage
from helpers.matrix import Matrix
from helpers.quantised import PROGRAMS, Tensors, folder, names, recorded

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WEIGHTS = "diffusion_pytorch_model.safetensors"
# Rows of docs/formats.md with other names: what we write too, and what is read alone.
ROWS = {name: "sdnq, other types" for name in names() if name.startswith("sdnq")}
ROWS |= {"sdnq_int8": "sdnq_int8", "sdnq_float8": "sdnq_fp8", "sdnq_uint4": "sdnq_uint4"}


def test_every_format_is_recorded() -> None:
    assert len(names()) == 20


@pytest.mark.parametrize("name", names())
def test_values_are_those_of_the_program(tmp_path: Path, name: str, matrix: Matrix) -> None:
    values = folder(name, tmp_path / "model")
    prior = inspect(tmp_path / "model").components[Stage.PRIOR]
    assert not prior.problems
    for dtype, cast in DTYPES.items():
        convert(tmp_path / "model", tmp_path / f"{dtype}.safetensors", "split", dtype=dtype)
        again = inspect(tmp_path / f"{dtype}.safetensors").components[Stage.PRIOR]
        found = {key: read_tensor(tensor) for key, tensor in again.tensors.items()}
        assert found.keys() == values.keys()
        differing = [key for key in values if not torch.equal(found[key], values[key].to(cast))]
        assert not differing
    assert all(torch.equal(read_tensor(prior.tensors[key]).float(), values[key].float()) for key in values)
    assert compare_checkpoints(inspect(tmp_path / "model"), inspect(tmp_path / "fp32.safetensors"))
    program, row = name.partition("_")[0], f"diffusers {ROWS.get(name, name)}"
    matrix.record(row, "read", by=program, version=PROGRAMS[program])
    matrix.record(row, "error", 0, by=program, version=PROGRAMS[program])


def test_inspect_names_format_bits_error_and_readers(tmp_path: Path) -> None:
    from cascadekit.converters.contents import component_facts

    bits = {"bitsandbytes_nf4": 4.5, "torchao_int8": 8 + 8 * 5 / 39, "sdnq_mixed": 4 + 64 / 48}
    names = {"bitsandbytes_nf4": "bitsandbytes nf4", "torchao_int8": "torchao Int8Tensor", "sdnq_mixed": "SDNQ uint4"}
    for name, kind in names.items():
        folder(name, tmp_path / name)
        facts = component_facts(inspect(tmp_path / name).components[Stage.PRIOR])
        assert not facts["problems"]
        assert facts["quantised"][kind]["bits"] == pytest.approx(bits[name], rel=0.05)
        assert kind.partition(" ")[0].lower() in facts["quantised"][kind]["readers"]
        assert 0 < facts["quantised"][kind]["error"] < 0.1


def change(place: Path, edit: Callable[[Tensors, dict[str, str]], object]) -> None:
    path = place / WEIGHTS
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata() or {})
    tensors = load_file(path)
    edit(tensors, metadata)
    save_file(tensors, path, metadata)


def described(metadata: dict[str, str], **values: Any) -> None:
    """Change what torchao's metadata say of one weight."""
    entry = json.loads(metadata["clip_txt_mapper.weight"])
    entry["_type"] = values.pop("kind", entry["_type"])
    entry["_data"] |= values
    metadata["clip_txt_mapper.weight"] = json.dumps(entry)


def stated(tensors: Tensors, **values: Any) -> None:
    """Change what bitsandbytes' state says of one weight."""
    tensors[STATE] = text(json.dumps(json.loads(bytes(tensors[STATE].numpy())) | values))


def config(place: Path, **settings: Any) -> None:
    values = json.loads((place / "config.json").read_text())
    values["quantization_config"] = values.get("quantization_config", {}) | settings
    (place / "config.json").write_text(json.dumps(values))


def text(content: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(content.encode()), dtype=torch.uint8)


ZEROS, LAYER, POOLED = torch.zeros(3), "clip_txt_mapper", "clip_txt_pooled_mapper"
STATE = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"
BAD: dict[str, tuple[str, Callable[[Tensors, dict[str, str]], object]]] = {
    "_weight_scale is missing": ("torchao_int8", lambda t, m: t.pop(f"{LAYER}._weight_scale")),
    "its class Int4TilePackedTo4dTensor is not supported; expected one of Int8Tensor": (
        "torchao_int8",
        lambda t, m: described(m, kind="Int4TilePackedTo4dTensor"),
    ),
    r"block_size \[1, 5\] is not supported for shape \[21, 39\]": (
        "torchao_int4",
        lambda t, m: described(m, block_size=[1, 5]),
    ),
    r"block_size \[3, 13\] is not supported": ("torchao_int4", lambda t, m: described(m, block_size=[3, 13])),
    r"its dtype is \[\], expected one of": ("torchao_int8", lambda t, m: described(m, dtype={"_data": []})),
    "the metadata by torchao cannot be read": ("torchao_int8", lambda t, m: m.update(tensor_names="[")),
    "absmax is missing": ("bitsandbytes_nf4", lambda t, m: t.pop(f"{LAYER}.weight.absmax")),
    r"absmax has shape \[3\], expected 13 numbers": (
        "bitsandbytes_nf4",
        lambda t, m: t.update({f"{LAYER}.weight.absmax": ZEROS}),
    ),
    r"blocksize 64 and dtype \{\}, which are not supported": (
        "bitsandbytes_nf4",
        lambda t, m: stated(t, dtype={}),
    ),
    "is no JSON": ("bitsandbytes_nf4", lambda t, m: t.update({STATE: text("{")})),
    "the codes have 410 bytes, expected 2": (
        "bitsandbytes_nf4",
        lambda t, m: t.update({STATE: text(bytes(t[STATE].numpy()).decode().replace("[21, 39]", "[2, 2]"))}),
    ),
    "weight.nested_quant_map is missing": (
        "bitsandbytes_nf4_nested",
        lambda t, m: t.pop(f"{LAYER}.weight.nested_quant_map"),
    ),
    "SCB has shape": ("bitsandbytes_int8", lambda t, m: t.update({f"{LAYER}.SCB": ZEROS})),
    f"{POOLED}.scale is missing": ("sdnq_int8", lambda t, m: t.pop(f"{POOLED}.scale")),
    f"{POOLED}.zero_point is missing": ("sdnq_uint4", lambda t, m: t.pop(f"{POOLED}.zero_point")),
    "the number of its rows is unknown": (
        "sdnq_uint4",
        lambda t, m: t.update({f"{POOLED}.scale": torch.ones(1, 1), f"{POOLED}.bias": torch.tensor(1.0)}),
    ),
    "zero_point has shape": ("sdnq_uint4", lambda t, m: t.update({f"{POOLED}.zero_point": ZEROS})),
    r"a part of low rank \(use_svd\), which is not supported": (
        "sdnq_uint4",
        lambda t, m: t.update({f"{POOLED}.svd_up": ZEROS}),
    ),
}


def refused(place: Path, message: str) -> None:
    with pytest.raises(CascadeError, match=message) as caught:
        inspect(place)
    line = str(caught.value)
    assert "\n" not in line
    assert str(place) in line
    assert "; " in line  # what to try next
    assert "damaged" not in line


@pytest.mark.parametrize("message", BAD)
def test_bad_files_get_one_clear_line(tmp_path: Path, message: str) -> None:
    name, edit = BAD[message]
    folder(name, tmp_path / "model")
    change(tmp_path / "model", edit)
    refused(tmp_path / "model", message)


SETTINGS: dict[str, dict[str, Any]] = {
    "quantised by quanto, which is not supported": {"quant_method": "quanto"},
    "its type uint12 is not supported": {"weights_dtype": "uint12"},
    "the codes have": {"weights_dtype": "uint6"},
    "rotated weights, which is not supported; save what `sdnq": {"use_hadamard": True},
    "a codebook of values": {"modules_quant_config": {POOLED: {"use_codebook": True}}},
    r"quantised by \['quanto'\], which is not supported": {"quant_method": ["quanto"]},
    r"modules_quant_config in its settings is \['x'\], expected a table of dicts": {"modules_quant_config": ["x"]},
    "modules_dtype_dict in its settings is .*, expected a table of lists": {"modules_dtype_dict": {"uint4": 3}},
    "its type uint13 is not supported": {"weights_dtype": "uint13", "modules_dtype_dict": {"uint4": [3]}},
    # This pattern would keep a matcher that tries every split busy for ever.
    "its type uint14 is not supported": {
        "weights_dtype": "uint14",
        "modules_dtype_dict": {"uint4": ["*" * 40 + "!"]},
    },
}


@pytest.mark.parametrize("message", SETTINGS)
def test_bad_settings_get_one_clear_line(tmp_path: Path, message: str) -> None:
    folder("sdnq_uint4", tmp_path / "model")
    config(tmp_path / "model", **SETTINGS[message])
    refused(tmp_path / "model", message)


def test_a_packed_weight_with_one_factor_has_the_rows_of_its_bias(tmp_path: Path) -> None:
    """SDNQ packs codes into one axis. Here, one factor and one zero point stand for all of them."""
    values = folder("sdnq_uint4", tmp_path / "model")
    one = {f"{POOLED}.scale": torch.full((1, 1), 0.25), f"{POOLED}.zero_point": torch.full((1, 1), -2.0)}
    codes = load_file(tmp_path / "model" / WEIGHTS)[f"{POOLED}.weight"]
    change(tmp_path / "model", lambda tensors, _: tensors.update(one))
    prior = inspect(tmp_path / "model").components[Stage.PRIOR].require_sound()
    assert torch.equal(read_tensor(prior.tensors[f"{POOLED}.bias"]), values[f"{POOLED}.bias"])
    expected = torch.stack([codes & 15, codes >> 4], dim=1).reshape(84, 10) * 0.25 - 2
    assert torch.equal(read_tensor(prior.tensors[f"{POOLED}.weight"]).float(), expected)


def test_sdnq_without_its_config_is_named(tmp_path: Path) -> None:
    folder("sdnq_int8", tmp_path / "model")
    (tmp_path / "alone").mkdir()
    path = (tmp_path / "model" / WEIGHTS).rename(tmp_path / "alone" / WEIGHTS)
    refused(path, "put config.json beside the file")


@pytest.mark.parametrize("name", names())
def test_without_a_dtype_weights_become_what_they_were(tmp_path: Path, name: str) -> None:
    """The dtype that a weight states, and else that of all other floats: bf16 here, as in a folder of one dtype."""
    values = folder(name, tmp_path / "model")
    states_dtype = name.startswith(("torchao", "bitsandbytes_nf4", "bitsandbytes_fp4"))
    if not states_dtype:  # the recorded biases have another dtype than the random weights
        change(tmp_path / "model", lambda tensors, _: tensors.update(biases(tensors)))
        values |= {key: tensor.bfloat16() for key, tensor in values.items() if key.endswith(".bias")}
    done = convert(tmp_path / "model", tmp_path / "out", "diffusers")
    stored = load_file(tmp_path / "out" / "prior" / WEIGHTS)
    recorded_keys = recorded(name)[2]
    for key, tensor in values.items():
        dtype = tensor.dtype if states_dtype or key not in recorded_keys else torch.bfloat16
        assert stored[key].dtype == dtype
        assert torch.equal(stored[key], tensor.to(dtype))
    (note,) = [note for note in done.notes if "as before they were quantised" in note]
    assert note.startswith("prior: ")
    assert ("BF16" in note) == any(stored[key.replace("/", ".")].dtype == torch.bfloat16 for key in recorded_keys)
    passport = inspect(tmp_path / "out").components[Stage.PRIOR].metadata[KEY]
    assert json.loads(passport)["values"] == "calculated"


def biases(tensors: Tensors) -> Tensors:
    return {key: tensor.bfloat16() for key, tensor in tensors.items() if key.endswith(".bias")}


def test_where_other_weights_differ_in_dtype_nothing_is_rounded(tmp_path: Path) -> None:
    values = folder("sdnq_int8", tmp_path / "model")
    change(tmp_path / "model", lambda tensors, _: tensors.update(clip_norm(tensors)))
    convert(tmp_path / "model", tmp_path / "out", "diffusers")
    stored = load_file(tmp_path / "out" / "prior" / WEIGHTS)
    for key in recorded("sdnq_int8")[2]:
        assert stored[key].dtype == torch.float32
        assert torch.equal(stored[key], values[key].float())


def clip_norm(tensors: Tensors) -> Tensors:
    name = next(key for key in tensors if key.endswith("mapper.bias") and "txt" not in key)
    return {name: tensors[name].half()}


@pytest.mark.parametrize("kind", [name for name in ERRORS if name.startswith(("SDNQ", "bitsandbytes nf4"))])
def test_errors_are_those_of_normal_numbers(kind: str) -> None:
    name = kind.partition(" ")[2].upper()
    name = {"FLOAT8_E4M3FN": "FLOAT8_E4M3FN_SDNQ"}.get(name, name)
    values = np.unique(np.array(values_of(name)))
    group = 64 if kind.startswith("bits") else 2 ** (bits_of(name) + 2)
    rows = np.random.default_rng(0).standard_normal((2**17 // group, group))
    least = rows.min(axis=1, keepdims=True) if name.startswith("UINT") else 0
    step = (np.abs(rows - least)).max(axis=1, keepdims=True) / values.max()
    codes = np.searchsorted((values[1:] + values[:-1]) / 2, (rows - least) / step)
    error = np.sqrt(np.square(values[codes] * step + least - rows).mean() / np.square(rows).mean())
    assert error == pytest.approx(ERRORS[kind], rel=0.04)
