"""`cascadekit validate`: sound bundles pass, and every planted fault is named."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import helper

from cascadekit import export
from cascadekit.cli import main
from cascadekit.converters.export.graph_files import external_data
from cascadekit.converters.export.validate import validate
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import open_bundle
from helpers.standins import accept_changes

GRAPHS = {
    "text_encoder": ("model",),
    "prior": ("model", "conditioning", "step"),
    "decoder": ("model", "conditioning", "step"),
    "vqgan": ("model", "encoder"),
}
Change = Callable[[onnx.ModelProto], None]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["validate", *(str(argument) for argument in arguments)])


def found(bundle: Path, *options: str) -> dict[str, Any]:
    """The report as JSON; its verdict must be the exit code's."""
    result = call(bundle, "--json", *options)
    assert "Traceback" not in result.output
    report: dict[str, Any] = json.loads(result.stdout)
    assert result.exit_code == (0 if report["valid"] else 1), result.output
    assert report["valid"] == (not problems(report))
    return report


def problems(report: dict[str, Any]) -> list[str]:
    return [problem for check in report["checks"] for problem in check["problems"]]


@pytest.fixture
def bundle(tiny: Path, tmp_path: Path) -> Path:
    """The tiny vqgan, copied."""
    export(tiny / "model", tmp_path / "bundle", stages=[Stage.VQGAN], weights="copy")
    return tmp_path / "bundle"


def changed(bundle: Path, change: Change, manifest: Callable[[dict[str, Any]], object] | None = None) -> str:
    """Change the graph behind the manifest's back, or with it, and return the one problem there is then."""
    path = bundle / "vqgan" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    if manifest:
        content = json.loads((bundle / "cascade.json").read_text())
        manifest(content["stages"]["vqgan"])
        (bundle / "cascade.json").write_text(json.dumps(content))
    accept_changes(bundle)
    return "\n".join(problems(found(bundle)))


@pytest.mark.parametrize("weights", ["copy", "link"])
def test_sound_bundles(tiny: Path, tmp_path: Path, weights: Any) -> None:
    export(tiny / "model", tmp_path / "bundle", weights=weights)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    report = found(tmp_path / "bundle")
    assert [(c["stage"], c["graph"]) for c in report["checks"]] == [
        *((stage, graph) for stage, graphs in GRAPHS.items() for graph in (None, *graphs)),
        (None, None),
    ]
    assert (report["checks"][-1]["files"], report["checks"][-1]["unlisted"]) == (1, [])
    for check in report["checks"][:-1]:
        if check["graph"]:
            model = onnx.load(tmp_path / "bundle" / check["stage"] / f"{check['graph']}.onnx", load_external_data=False)
            counts: dict[str, int] = {}
            for node in model.graph.node:
                counts[node.op_type] = counts.get(node.op_type, 0) + 1
            assert check["operators"] == counts
            assert (check["opset"], check["ir_version"]) == (model.opset_import[0].version, model.ir_version)
            assert check["polygraphy"] == "not installed"
        else:
            assert check["without_sha256"] == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_the_table(bundle: Path) -> None:
    result = call(bundle, "--verbose")
    assert result.exit_code == 0
    words = " ".join(result.stdout.split())
    assert "vqgan files ok 3 files, weights: copied" in words
    assert "opset 20, IR 10; polygraphy not installed" in words
    assert words.endswith(" valid: 1 stage, 2 graphs, 4 files")
    (bundle / "vqgan/weights.safetensors").unlink()
    result = call(bundle)
    assert result.exit_code == 1
    assert "it is missing; put it back, or export the model again" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("INVALID: 1 stage, ")


def test_hashes_that_were_not_recorded_are_reported(tiny: Path, tmp_path: Path) -> None:
    export(tiny / "model", tmp_path / "bundle", stages=[Stage.VQGAN], weights="link", hash=False)
    source = tiny / "model/vqgan/diffusion_pytorch_model.safetensors"
    (file,) = found(tmp_path / "bundle", "--hash")["checks"][0]["without_sha256"]
    assert file["sha256_now"] == hashlib.sha256(source.read_bytes()).hexdigest()
    result = call(tmp_path / "bundle", "--hash", "--verbose")
    assert f"{file['path']} (now {file['sha256_now']})" in result.stdout
    assert "1 files were exported without a SHA-256: of their bytes only samples can be compared" in result.stderr


def flip_unseen(path: Path, position: int) -> None:
    """One bit, the time of change kept."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 4]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_flipped_bit_behind_the_same_time(bundle: Path) -> None:
    flip_unseen(bundle / "vqgan/weights.safetensors", 5000)
    assert found(bundle)["valid"]
    assert "vqgan/weights.safetensors: expected SHA-256" in problems(found(bundle, "--hash"))[0]


@pytest.mark.parametrize("weights", ["auto", "link", "copy"])
def test_hash_finds_one_flipped_bit_in_any_file(tiny: Path, tmp_path: Path, weights: Any) -> None:
    """Whatever its time says, at any place of any file, the tokenizer among them."""
    shutil.copytree(tiny / "model", tmp_path / "model")
    root = tmp_path / "bundle"
    export(tmp_path / "model", root, stages=[Stage.VQGAN], weights=weights)
    whole = {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != "cascade.json"}
    assert {path.suffix for path in whole} == {".onnx", ".safetensors", ".json"}
    rng = random.Random(0)
    for path, content in whole.items():
        for position in (0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(3))):
            flip_unseen(path, position)
            checks = validate(open_bundle(root), hash=True).checks
            name = path.relative_to(root).as_posix()
            assert any(p.startswith(f"{name}: expected SHA-256") for check in checks for p in check.problems), name
            flip_unseen(path, position)
    assert validate(open_bundle(root), hash=True)


def test_the_tokenizer_is_compared(bundle: Path) -> None:
    """Two words exchanged give other images: neither loading nor the check passes over it."""
    path = bundle / "tokenizer/tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    vocab["cat</w>"], vocab["dog</w>"] = vocab["dog</w>"], vocab["cat</w>"]
    path.write_text(json.dumps(content), encoding="utf-8")
    (problem,) = problems(found(bundle))
    assert problem.startswith("tokenizer/tokenizer.json: expected ")
    assert "tokenizer.json: expected " in str(open_bundle(bundle).tokenizer_change())  # `generate` notes it
    path.unlink()
    assert "it is missing; put it back" in problems(found(bundle))[0]


def test_files_in_no_list_are_named(bundle: Path) -> None:
    (bundle / "vqgan/stray.bin").write_bytes(b"x")
    report = found(bundle)
    assert (report["valid"], report["checks"][-1]["unlisted"]) == (True, ["vqgan/stray.bin"])
    assert "in no list: vqgan/stray.bin" in " ".join(call(bundle, "--verbose").stdout.split())


def test_manifests_from_before_the_tokenizer_was_listed_are_read(bundle: Path) -> None:
    path = bundle / "cascade.json"
    content = json.loads(path.read_text())
    del content["files"]
    path.write_text(json.dumps(content))
    assert open_bundle(bundle).tokenizer == bundle / "tokenizer/tokenizer.json"
    assert found(bundle)["checks"][-1]["unlisted"] == ["tokenizer/tokenizer.json"]


@pytest.mark.parametrize("name", ["vqgan/model.onnx", "vqgan/weights.safetensors", "tokenizer/tokenizer.json"])
def test_what_is_no_regular_file_is_not_waited_for(bundle: Path, name: str) -> None:
    """Opening a pipe would wait for ever; a device has no end."""
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir):
        (shutil.rmtree if (bundle / name).is_dir() else os.unlink)(bundle / name)
        make(bundle / name)
        for options in ((), ("--hash",)):
            assert any(f"{name}: expected" in problem for problem in problems(found(bundle, *options)))


def test_a_graph_that_is_none(bundle: Path) -> None:
    path = bundle / "vqgan/model.onnx"
    path.write_bytes(path.read_bytes()[:-1000])
    assert any("model.onnx: expected" in problem for problem in problems(found(bundle)))
    accept_changes(bundle)
    assert "cannot be read as ONNX" in problems(found(bundle))[0]
    path.unlink()
    assert any("it is missing" in problem for problem in problems(found(bundle)))


def foreign(model: onnx.ModelProto) -> None:
    """A Gelu of onnxruntime's own in place of the standard's."""
    node = next(node for node in model.graph.node if node.op_type == "Gelu")
    del node.attribute[:]
    node.domain = "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


@pytest.mark.parametrize("target", ["portable", "tensorrt", "ort"])
def test_operators_that_the_target_does_not_have(bundle: Path, target: str) -> None:
    said = changed(bundle, foreign, lambda entry: entry.update(target=target))
    if target == "ort":
        assert not said
        (check,) = (check for check in found(bundle)["checks"] if check["graph"] == "model")
        assert check["operators"]["com.microsoft::Gelu"] == 1
    else:
        assert said == f"operators com.microsoft::Gelu: a graph with target {target} may use those of ai.onnx only"


def test_operators_inside_other_operators(bundle: Path) -> None:
    def nested(model: onnx.ModelProto) -> None:
        inner = helper.make_graph(
            [helper.make_node("Odd", [], ["y"], domain="org.example")],
            "inner",
            [],
            [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        )
        condition = helper.make_tensor("condition", onnx.TensorProto.BOOL, (), [True])
        model.graph.initializer.append(condition)
        node = helper.make_node("If", ["condition"], ["unused"], then_branch=inner, else_branch=inner)
        model.graph.node.append(node)
        model.opset_import.append(helper.make_opsetid("org.example", 1))

    assert "operators org.example::Odd: a graph with target portable may use those of ai.onnx only" in changed(
        bundle, nested
    )


def test_ports_and_opset_are_the_manifests(bundle: Path) -> None:
    def other_port(entry: dict[str, Any]) -> None:
        entry["graphs"]["model"]["inputs"][0]["dims"][1] = 5
        entry["graphs"]["model"]["opset"] = 19

    said = changed(bundle, lambda model: None, other_port)
    assert "expected opset 19 as the manifest says, found 20" in said
    assert "expected inputs latents float32 [batch, 5, height, width] as the manifest says, found latents" in said


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("location", "../weights.safetensors", "'../weights.safetensors', which is not a file beside the graph"),
        ("location", "/etc/passwd", "'/etc/passwd', which is not a file beside the graph"),
        ("location", "", "'', which is not a file beside the graph"),
        ("location", "none.safetensors", "'none.safetensors', which is not a file beside the graph"),
        ("offset", "999999999", "bytes 999999999 to"),
        ("offset", "-8", "bytes -8 to"),
        ("length", "12", "12 bytes, expected"),
        ("offset", "x", "the offset or length of an initialiser is no number"),
    ],
)
def test_weights_that_lie_elsewhere(bundle: Path, key: str, value: str, message: str) -> None:
    def move(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
        next(entry for entry in tensor.external_data if entry.key == key).value = value

    assert message in changed(bundle, move)


@pytest.mark.parametrize(("kind", "target"), [("int8", "ort"), ("int4", "tensorrt"), ("fp8", "portable")])
def test_weights_in_8_and_4_bits(tiny: Path, tmp_path: Path, kind: str, target: str) -> None:
    bundle = tmp_path / "bundle"
    export(tiny / "model", bundle, stages=["prior"], weights="copy", quantize=kind, target=target)
    assert found(bundle)["valid"]
    path = bundle / "prior/model.onnx"
    model = onnx.load(path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name.endswith(".weight_quantized"))
    length = next(entry for entry in tensor.external_data if entry.key == "length")
    values = {"int8": 1, "int4": 2, "fp8": 1}[kind] * int(length.value)
    assert values == np.prod(tensor.dims)
    length.value = str(int(length.value) - 1)
    onnx.save(model, path)
    assert f"expected {int(length.value) + 1} for" in " ".join(problems(found(bundle)))


@pytest.mark.parametrize("name", ["a.b+b.weight", "a." + "b+" * 40 + "b.scale"])
def test_names_like_those_of_joined_weights(name: str) -> None:
    """A number cannot be taken apart; a name with many signs, which is none of ours, was read for hours."""
    model = onnx.ModelProto()
    tensor = model.graph.initializer.add(name=name, data_location=onnx.TensorProto.EXTERNAL)
    tensor.data_type = onnx.TensorProto.FLOAT
    assert [(each.name, each.dims) for each in external_data(model)] == [(name, ())]


def test_a_lost_file_of_weights_is_said_once(bundle: Path) -> None:
    """Each of its tensors was listed, and the name of a scratch folder told."""
    (bundle / "vqgan/weights.safetensors").unlink()
    said = problems(found(bundle))
    assert sum("not a file beside the graph" in text for text in said) == 2  # a graph each
    assert max(map(len, said)) < 250
    assert not any("/tmp" in text.replace(str(bundle), "") for text in said)


def test_weights_behind_a_symbolic_link(bundle: Path, tmp_path: Path) -> None:
    path = bundle / "vqgan/weights.safetensors"
    shutil.move(path, tmp_path / "away")
    path.symlink_to(tmp_path / "away")
    assert found(bundle, "--hash")["valid"]
    (tmp_path / "away").unlink()
    assert any("it is missing" in problem for problem in problems(found(bundle)))


def test_shapes_that_do_not_fit(bundle: Path) -> None:
    def twist(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "Gemm")
        node.attribute[0].i = 0  # transB

    assert "strict shape inference: " in changed(bundle, twist)


def test_a_value_that_nobody_gives(bundle: Path) -> None:
    def lose(model: onnx.ModelProto) -> None:
        model.graph.node[5].input[0] = "nowhere"

    assert "onnx.checker: " in changed(bundle, lose)


@pytest.mark.parametrize(("code", "word"), [("print('fine')", "passed"), ("raise SystemExit('it is odd')", "failed")])
def test_polygraphy_is_asked_where_it_is_installed(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, word: str
) -> None:
    package = tmp_path / "site" / "polygraphy"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "tools.py").write_text(
        "import sys, pathlib\ndef main():\n"
        f"    assert sys.argv[1:3] == ['inspect', 'model'] and pathlib.Path(sys.argv[3]).is_file()\n    {code}"
    )
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")]))
    report = found(bundle)
    checks = [check for check in report["checks"] if check["graph"]]
    assert [check["polygraphy"] for check in checks] == [word, word]
    assert problems(report) == ([] if word == "passed" else ["polygraphy inspect model: it is odd"] * 2)


def test_what_is_no_bundle(tiny: Path) -> None:
    result = call(tiny / "model")
    assert result.exit_code == 2
    assert "not a bundle" in result.stderr
    assert "Example: cascadekit validate" in " ".join(call("--help").output.split())
