"""Names in a manifest become paths: those that lead elsewhere, or that some system cannot have, are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from cascadekit.schemas.errors import CheckpointError
from cascadekit.schemas.manifest import parse_manifest
from cascadekit.schemas.paths import problem_of_name, problem_of_path

GOOD = ["a", "model.onnx", "weights 1.safetensors", "Ünïcödé 猫.bin", ".hidden", "a..b", "console", "com", "a" * 255]
BAD = ["", ".", "..", "a/b", "a\\b", "/etc", "C:", "a:b", "a\0", "a\n", "\x1b[31m", "x\x7f", "a.", "a ", "a" * 256]
BAD += ["CON", "nul", "aux.txt", "Com1", "LPT9.onnx", "\ud83d", "é" * 128]


@pytest.mark.parametrize("name", GOOD)
def test_plain_names(name: str) -> None:
    assert problem_of_name(name) is None
    assert problem_of_path(f"prior/{name}") is None


@pytest.mark.parametrize("name", BAD)
def test_names_that_are_none(name: str) -> None:
    assert problem_of_name(name)
    if name != "a/b":
        assert problem_of_path(f"prior/{name}/x")


@pytest.mark.parametrize("path", ["/a", "../a", "a/../../b", "a//b", "a/./b", "a/", "/".join("a" * 17)])
def test_paths_that_are_none(path: str) -> None:
    assert problem_of_path(path)


NAMED = [f"stages/vqgan/{inner}" for inner in ("graphs/=encoder", "graphs/model/path", "files/0/path")]
NAMED += ["tokenizer", "files/0/path"]


def changed(tiny: Path, place: str, value: Any) -> str:
    """The manifest with another value at a place, "/" between its keys; "=" in front of the last renames it."""
    content = json.loads((tiny / "bundle/cascade.json").read_text())
    content["stages"]["vqgan"]["plans"] = []
    *way, last = place.split("/")
    inner = content
    for key in way:
        inner = inner[int(key)] if isinstance(inner, list) else inner[key]
    if last.startswith("="):
        inner[value] = inner.pop(last[1:])
    else:
        inner[int(last) if isinstance(inner, list) else last] = value
    return json.dumps(content)


@pytest.mark.parametrize("name", ["/tmp/made", "a/b", "..", "", "a\\b", "a\0b", "NUL", "x" * 300])
@pytest.mark.parametrize("place", NAMED)
def test_every_name_of_a_manifest_is_checked(tiny: Path, place: str, name: str) -> None:
    if name == "a/b" and "=" not in place:
        name = "a/../../b"
    with pytest.raises(CheckpointError, match="not a manifest of format cascadekit-bundle 2") as caught:
        parse_manifest(changed(tiny, place, name), "cascade.json")
    assert "\n" not in str(caught.value)


INFINITE = float("inf")


@pytest.mark.parametrize(
    ("place", "values"),
    [
        ("vqgan_scale", [0, -0.3, INFINITE, float("nan"), 1e9, 1e-9]),
        ("default_size", [[0, 64], [-8, 64], [1 << 30, 64], [64], [64.5, 64]]),
        ("stages/vqgan/files/0/bytes", [-1, 1 << 70, 1.5]),
        ("stages/vqgan/files/0/mtime_ns", [1 << 80, INFINITE]),
        ("stages/vqgan/graphs/model/opset", [-1, 1 << 40]),
        ("stages/vqgan/graphs/model/inputs/0/dims", [[-1], [1 << 60], [INFINITE]]),
        ("stages/vqgan/exponents", [{"a": -1}, {"a": 99}]),
        ("stages/vqgan/fp16_margins", [{"a": INFINITE}, {"a": float("nan")}]),
        ("stages/vqgan/config", [{"scale_factor": INFINITE}, {"scale_factor": 0}, {"x": [{"y": float("nan")}]}]),
        ("stages/vqgan/control", [[-1], [1 << 60]]),
    ],
)
def test_every_number_of_a_manifest_is_checked(tiny: Path, place: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(CheckpointError, match="not a manifest of format"):
            parse_manifest(changed(tiny, place, value), "cascade.json")


def test_the_dtype_of_a_port_is_checked(tiny: Path) -> None:
    """numpy raised a TypeError for it when the graph ran."""
    with pytest.raises(CheckpointError, match=r"graphs.model.inputs.0: .*expected a dtype among float32, .* found 'x'"):
        parse_manifest(changed(tiny, "stages/vqgan/graphs/model/inputs/0/dtype", "x"), "cascade.json")


def test_one_file_is_listed_once(tiny: Path) -> None:
    content = json.loads((tiny / "bundle/cascade.json").read_text())
    content["stages"]["vqgan"]["files"] *= 2
    with pytest.raises(CheckpointError, match="listed twice"):
        parse_manifest(json.dumps(content), "cascade.json")
