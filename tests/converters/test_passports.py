"""Passports: other libraries open the files and read them, one changed byte shows, conversions back lose nothing."""

import hashlib
import json
import shutil
import struct
import zlib
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import gguf
import jsonschema
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from cascadekit import convert, merge_loras
from cascadekit.cli import main
from cascadekit.converters.checkpoints.example_model import EXAMPLE_LORA, EXAMPLE_MODEL
from cascadekit.converters.contents import contents_of
from cascadekit.converters.lora.convert_lora import convert_lora
from cascadekit.converters.passport_check import check_folder, check_passport, check_passports
from cascadekit.schemas.errors import CascadeError
from cascadekit.schemas.json_models import schema_text
from cascadekit.schemas.passport import Passport, passport_text
from cascadekit.schemas.passport_keys import FOLDER_KEY, KEY
from cascadekit.storage import content_digest
from cascadekit.storage.content_digest import content_of
from cascadekit.storage.safetensors_plan import TensorPlan
from cascadekit.storage.safetensors_reader import read_header
from cascadekit.storage.safetensors_writer import write_safetensors
from helpers.files import flip

SCHEMA = (files("cascadekit.schemas") / "passport.schema.json").read_text(encoding="utf-8")


def passport_of(path: Path) -> dict[str, Any]:
    """The passport as the library of the format reads it; its digest is checked against its definition."""
    if path.suffix == ".gguf":
        text = gguf.GGUFReader(path).fields[KEY].contents()
    elif path.suffix == ".onnx":
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path, load_external_data=False)
        text = {entry.key: entry.value for entry in model.metadata_props}[KEY]
    elif path.suffix == ".json":
        text = json.dumps(json.loads(path.read_text())[FOLDER_KEY])
    else:
        with safe_open(path, "np") as file:
            text = file.metadata()[KEY]
    passport = json.loads(text)
    jsonschema.validate(passport, json.loads(SCHEMA))
    assert passport["content"] == digest(path.read_bytes(), passport["content"], 1 << 20)
    return passport


def digest(content: bytes, stated: str, block: int) -> str:
    """The digest as docs/passports.md defines it, in hashlib and zlib alone."""
    zeros = stated[:-64] + "0" * 64
    content = content.replace(stated.encode(), zeros.encode(), 1)
    crcs = [zlib.crc32(content[at : at + block]) for at in range(0, len(content), block)]
    return stated[:-64] + hashlib.sha256(struct.pack(f"<{len(crcs)}I", *crcs)).hexdigest()


def test_the_published_schema_is_that_of_the_models() -> None:
    assert schema_text(Passport) == SCHEMA
    jsonschema.Draft202012Validator.check_schema(json.loads(SCHEMA))


def test_weights_say_what_they_are_made_of(tmp_path: Path) -> None:
    source = EXAMPLE_MODEL / "stage_c.safetensors"
    convert(source, tmp_path / "c.safetensors", "split", dtype="bf16")
    convert(source, tmp_path / "c.gguf", "gguf", quantize="q8_0")
    for path, quantization in ((tmp_path / "c.safetensors", None), (tmp_path / "c.gguf", "Q8_0")):
        found = passport_of(path)
        (made_of,) = found["sources"]
        assert made_of["name"] == "stage_c.safetensors"
        assert made_of["bytes"] == source.stat().st_size
        assert made_of["fingerprint"] == hashlib.sha256(struct_size(source) + source.read_bytes()).hexdigest()
        assert (found["values"], found.get("quantization")) == ("calculated", quantization)
        assert found["created_by"].startswith("cascadekit ")
    assert "Q8_0" in found["dtypes"]


def struct_size(path: Path) -> bytes:
    return path.stat().st_size.to_bytes(8, "little")  # files of at most 4 MiB are hashed whole


def test_the_same_sources_elsewhere_make_the_same_bytes(tmp_path: Path) -> None:
    """No path, no time: the name of a folder leaves no trace."""
    folders = [tmp_path / "qzxuser", tmp_path / "else"]
    for folder in folders:
        shutil.copytree(EXAMPLE_MODEL, folder / "in")
        convert(folder / "in", folder / "out", "modular")
    first, second = (
        {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        for folder in (folders[0] / "out", folders[1] / "out")
    )
    assert first == second
    assert not any(b"qzxuser" in content for content in first.values())


@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
def test_there_and_back_is_byte_for_byte(tmp_path: Path, layout: str) -> None:
    """Into files without passports, and into files with them."""
    convert(EXAMPLE_MODEL, tmp_path / "there", layout)
    convert(tmp_path / "there", tmp_path / "back", "original")
    for name in ("stage_a", "stage_b", "stage_c"):
        path = Path(f"{name}.safetensors")
        if layout == "diffusers" or name != "stage_a":  # ComfyUI's file has the metadata of its first component
            assert (tmp_path / "back" / path).read_bytes() == (EXAMPLE_MODEL / path).read_bytes()
    convert(EXAMPLE_MODEL, tmp_path / "cast", "split", dtype="fp32")
    convert(tmp_path / "cast", tmp_path / "model", "diffusers")
    convert(tmp_path / "model", tmp_path / "again", "split")
    path = Path("stage_b.safetensors")
    assert passport_of(tmp_path / "again" / path)["values"] == "calculated"
    assert (tmp_path / "again" / path).read_bytes() == (tmp_path / "cast" / path).read_bytes()


def test_a_rounded_file_is_not_taken_for_its_source(tmp_path: Path) -> None:
    """fp16 to bf16 and back has the header of the source, and other values."""
    source = EXAMPLE_MODEL / "stage_b.safetensors"
    convert(source, tmp_path / "b.safetensors", "split", dtype="bf16")
    convert(tmp_path / "b.safetensors", tmp_path / "back.safetensors", "original", dtype="fp16")
    assert passport_of(tmp_path / "back.safetensors")["sources"][0]["passport"]["sources"][0]["name"] == source.name


def test_loras(tmp_path: Path) -> None:
    lora = EXAMPLE_LORA
    merge_loras(EXAMPLE_MODEL / "stage_c.safetensors", [lora], tmp_path / "m.safetensors", strengths=[0.7])
    found = passport_of(tmp_path / "m.safetensors")
    assert [(one["name"], one["strength"]) for one in found["loras"]] == [(lora.name, 0.7)]
    assert [one["name"] for one in found["sources"]] == ["stage_c.safetensors"]
    convert_lora(lora, tmp_path / "l.safetensors", "comfyui", against=EXAMPLE_MODEL / "stage_c.safetensors")
    assert [one["name"] for one in passport_of(tmp_path / "l.safetensors")["sources"]] == [lora.name]
    assert contents_of(tmp_path / "l.safetensors", hash=True)


def test_graphs_of_a_bundle(tiny: Path) -> None:
    graph = tiny / "bundle" / "decoder" / "model.onnx"
    found = passport_of(graph)
    assert found["precision"] == "fp32"
    assert [one["name"] for one in found["sources"]] == ["diffusion_pytorch_model.safetensors"]
    assert contents_of(graph)
    shown = CliRunner().invoke(main, ["inspect", str(graph)]).output
    assert "passport of model.onnx: every byte is as it was written by cascadekit" in " ".join(shown.split())


def test_one_changed_byte_shows_in_a_bundle(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "bundle", tmp_path / "bundle")
    assert contents_of(tmp_path / "bundle", hash=True)
    for name in ("decoder/model.onnx", "prior/weights.safetensors"):
        path = tmp_path / "bundle" / name
        flip(path, path.stat().st_size - 5, touched=False)
        assert name in contents_of(tmp_path / "bundle", hash=True).to_json()["changed"]


def test_one_changed_byte_shows_anywhere_in_a_file(tmp_path: Path) -> None:
    save_file({"a": np.arange(30, dtype=np.float32)}, tmp_path / "in.safetensors")
    source = read_header(tmp_path / "in.safetensors").tensors["a"]
    path = tmp_path / "x.safetensors"
    plans = {"a": TensorPlan("F32", (30,), (source,)), "b": TensorPlan("F16", (30,), (source,))}
    write_safetensors(path, plans, {"format": "pt", KEY: passport_text(Passport(created_by="this test"))})
    passport_of(path)
    whole = path.read_bytes()
    assert all(state.good for state in check_passports([path], hash=True))
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with suppress(CascadeError):  # a header that does not hold together
            assert not all(state.good for state in check_passports([path], hash=True)), at


@pytest.mark.parametrize("piece", [64, 960, 4096])
def test_pieces_are_hashed_while_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """Copied, cast, transposed, repeated and zero values, in the order in which they happen to be written."""
    monkeypatch.setattr(content_digest, "PIECE", piece)
    monkeypatch.setattr(content_digest, "BLOCK", 64)
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal((17, 31)).astype(np.float32) for name in "abcd"}
    save_file(tensors, tmp_path / "in.safetensors")
    found = read_header(tmp_path / "in.safetensors").tensors
    turned = {name: part.__class__(**{**vars(part), "transposed": True}) for name, part in found.items()}
    plans = {
        "cast": TensorPlan("F16", (17, 31), (found["d"],)),
        "zeros": TensorPlan("I64", (9,), ()),
        "turned": TensorPlan("BF16", (17, 31), (turned["b"],)),
        "copied": TensorPlan("F32", (34, 31), (found["c"], found["a"])),
    }
    path = tmp_path / "x.safetensors"
    write_safetensors(path, plans, {KEY: passport_text(Passport(created_by="this test"))})
    with safe_open(path, "np") as file:
        stated = json.loads(file.metadata()[KEY])["content"]
        np.testing.assert_array_equal(file.get_tensor("copied"), np.concatenate([tensors["c"], tensors["a"]]))
    assert stated == digest(path.read_bytes(), stated, 64) == content_of(path, stated)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("passports") / "model"
    convert(EXAMPLE_MODEL, folder, "modular")
    return folder


def test_a_changed_folder_shows(model: Path, tmp_path: Path) -> None:
    passport_of(model / "modular_model_index.json")
    assert contents_of(model, hash=True)
    for number, name in enumerate(
        ("block.py", "tokenizer/vocab.json", "vqgan/config.json", "modular_model_index.json")
    ):
        copy = tmp_path / str(number)
        shutil.copytree(model, copy)
        with (copy / name).open("a") as file:
            file.write(" ")
        shown = CliRunner().invoke(main, ["inspect", str(copy)])
        assert shown.exit_code == 1
        assert ("changed since it was written" if "index" in name else f"{name} was changed") in shown.output
    (copy / "block.py").unlink()
    (copy / "modular_model_index.json").write_bytes((model / "modular_model_index.json").read_bytes())
    assert "block.py is missing" in CliRunner().invoke(main, ["inspect", str(copy)]).output


def test_inspect_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    convert(EXAMPLE_MODEL / "stage_a.safetensors", path, "original", dtype="fp32")
    shown = CliRunner().invoke(main, ["inspect", str(path)])
    assert shown.exit_code == 0
    assert "every byte is as it was written" in shown.output
    flip(path, path.stat().st_size - 1, touched=False)
    shown = CliRunner().invoke(main, ["inspect", str(path), "--json"])
    assert shown.exit_code == 1
    (state,) = json.loads(shown.output)[0]["passports"]
    assert not state["good"]
    assert "changed since it was written" in state["state"]
    bare = ["convert", str(EXAMPLE_MODEL / "stage_a.safetensors"), "-o", str(path), "--to", "original", "--no-passport"]
    assert CliRunner().invoke(main, [*bare, "--force", "--dtype", "fp32"]).exit_code == 0
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert CliRunner().invoke(main, ["inspect", str(path)]).exit_code == 0
    assert "no passport" in CliRunner().invoke(main, ["inspect", str(path), "--hash"]).output


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": "other"}', '{"format": "cascadekit-passport", "content": "crc32-blocks:0"}']
)
def test_a_passport_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": np.zeros(3, np.float32)}, path, {KEY: text})
    (state,) = check_passports([path], hash=False)
    assert not state.good
    assert state.text.startswith("changed: ")


def test_the_digest_of_another_version_is_not_called_a_change(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    passport = {"format": "cascadekit-passport", "content": f"sha512-tree:{'1' * 64}", "created_by": "cascadekit 9"}
    save_file({"a": np.zeros(3, np.float32)}, path, {KEY: json.dumps(passport)})
    for hash in (False, True):
        (state,) = check_passports([path], hash=hash)
        assert state.good is not hash
        assert (
            state.text == "its digest is of the kind sha512-tree, which this version of cascadekit does not calculate; "
            "inspect the file with the version that wrote it, or write it again for a new passport"
        )
    (tmp_path / "model_index.json").write_text(json.dumps({FOLDER_KEY: passport}))
    (state,) = check_folder(tmp_path, hash=False)
    assert "sha512-tree" in state.text


def test_a_source_with_a_passport_that_cannot_be_read_is_noted_once(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLE_MODEL, tmp_path / "model")
    path = tmp_path / "model" / "stage_a.safetensors"
    save_file(load_file(path), path, {KEY: "{}"})
    notes = convert(tmp_path / "model", tmp_path / "out", "diffusers", dtype="fp32").notes
    (note,) = [note for note in notes if note.endswith("it is left out")]
    assert note.startswith(f"{path}: its passport cannot be read")
    assert contents_of(tmp_path / "out", hash=True)


def test_names_of_a_passport_stay_in_the_folder(tmp_path: Path) -> None:
    secret = {"format": "cascadekit-passport", "content": f"crc32-blocks:{'1' * 64}", "files": {"../x": "0"}}
    assert "not in the folder" in check_passport(tmp_path, json.dumps(secret), hash=False).text
