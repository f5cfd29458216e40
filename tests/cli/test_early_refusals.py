"""A command that cannot work is refused before any work: a download, a conversion, a stage, a LoRA merged.

Each row is a command, its exit code, and words of the message. HF is a model on the Hub, whose download is work."""

import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cascadekit.cli import main

HF = "hf://nobody/model"
WORK = (
    "cascadekit.converters.hub.fetch",
    "cascadekit.converters.checkpoints.example_model.copy_example_model",
    "cascadekit.converters.lora.bundle_cache.with_loras",
    "cascadekit.parity.demo.copy_example_model",
    "cascadekit.parity.gpu_check.check_gpu",
    "cascadekit.parity.inside.bisect.bisect_stage",
    "cascadekit.parity.verify.compare_engine",
    "cascadekit.parity.verify.run_reference",
    "cascadekit.parity.verify.open_model",
    "cascadekit.converters.lora.merge_checkpoint.changed",
    "cascadekit.runtime.networks.Networks.load",
)
VERIFY = "verify {bundle} --against {model} --no-verdict"
ROWS = [
    (f"convert {HF} --to diffusers -o x --shard-size 1XB", 2, "--shard-size 1XB: expected a size such as 10GB"),
    (f"convert {HF} --to original -o file/x", 2, "file/x: {here}/file is no folder"),
    (f"convert {HF} --to original -o there.safetensors", 2, "there.safetensors: exists already"),
    (f"convert {HF} --to split -o x --quantize q8_0", 2, "leave it out, or take --to gguf"),
    (f"convert {HF} --to split -o x --combined", 2, "--combined: the split layout has no such folders"),
    (f"convert {HF} --to gguf -o x.safetensors", 2, "a name in .safetensors does not fit --to gguf"),
    (f"export {HF} -o file/x", 2, "file/x: {here}/file is no folder"),
    (f"export {HF} -o {{bundle}}", 2, "exists already, with"),
    (f"export {HF} -o x --stage vqgan --fp16-safe auto", 2, "--fp16-safe auto is for a prior, decoder or vqgan"),
    (f"export {HF} -o x --stage vqgan --controlnet", 2, "--controlnet is for the prior"),
    (f"export {HF} -o x --precision fp16 --calibration file/c", 2, "file/c: {here}/file is no folder"),
    (f"build {HF} -o x --arch sm89", 1, "tensorrt-rtx is not installed"),
    (f"build {HF} -o x --backend tensorrt", 1, "tensorrt is not installed"),
    ("build {bundle} --arch sm89 --cache file/c", 2, "file/c: {here}/file is no folder"),
    (f"lora merge {HF} l.safetensors -o file/x.safetensors", 2, "file/x.safetensors: {here}/file is no folder"),
    (f"lora merge {HF} l.safetensors -o there.safetensors", 2, "there.safetensors: exists already"),
    (f"lora merge {HF} a b -o x --strength 1", 2, "expected one strength for each LoRA (2), found 1"),
    (f"lora merge {HF} a -o x --strength nan", 2, "strength nan: expected finite numbers"),
    (f"lora merge {HF} a:inf -o x", 2, "strength inf: expected finite numbers"),
    (f"lora merge {HF} a -o x --alpha inf", 2, "alpha inf: expected a finite number"),
    (f"lora convert {HF} --to kohya -o x.bin", 2, "x.bin: expected a name ending in .safetensors"),
    (f"lora convert {HF} --to kohya -o there.safetensors", 2, "there.safetensors: exists already"),
    (f"{VERIFY} --size 100x100", 2, "height 100: expected a multiple of 8"),
    (f"{VERIFY} --engine openvino --device cuda", 2, "openvino runs on cpu"),
    (f"{VERIFY} --record file/x", 2, "file/x: {here}/file is no folder"),
    (f"{VERIFY} --report file/x.html", 2, "there is no folder file"),
    ("demo -o x --seed 99999999999999999999", 2, "Invalid value for '--seed'"),
    ("demo {long} -o x", 2, "a prompt of 200000 characters"),
    ("demo -o file/x", 2, "file/x: {here}/file is no folder"),
    ("doctor --gpu -o file/r.json", 2, "file/r.json: {here}/file is no folder"),
    ("ui {bundle} --no-open --port 0 -o file/x", 2, "file/x: {here}/file is no folder"),
    ("ui {bundle} --no-open --port 0 --host 256.1.1.1", 2, "256.1.1.1, port 0: cannot listen there"),
    ("generate {bundle} --prompts wrong.csv", 2, "wrong.csv:2: settings: --prior-steps -1: expected 1 to 1000"),
    ("generate {bundle} --prompts good.txt -o file/x", 2, "file/x: {here}/file is no folder"),
    ("generate {bundle} --prompts good.txt -o {bundle}/x", 2, "is inside the source"),
    ("generate {bundle} x --memory much -o x", 2, "memory 'much': expected auto, resident, staged, or a size"),
    ("generate {bundle} x --engine tensorrt-rtx --lora l.safetensors -o x", 1, "tensorrt"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a file where outputs would need a folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.csv").write_text("prompt,prior_steps\na cat,-1\n")
    (tmp_path / "good.txt").write_text("a cat\n")
    for name in ("file", "there.safetensors", "l.safetensors"):
        (tmp_path / name).touch()
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    return tmp_path


@pytest.mark.parametrize(("command", "code", "words"), ROWS, ids=[row[0] for row in ROWS])
def test_refused_before_any_work(
    tiny: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, command: str, code: int, words: str
) -> None:
    begun: list[str] = []

    def work(name: str) -> Any:
        def begin(*_: Any, **__: Any) -> None:
            begun.append(name)
            raise KeyboardInterrupt

        return begin

    for name in WORK:
        monkeypatch.setattr(name, work(name))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    places = {"bundle": tiny / "bundle", "model": tiny / "model", "here": folder, "long": "x" * 200_000}
    result = CliRunner().invoke(main, [word.format(**places) for word in command.split()])
    assert begun == []
    assert result.exit_code == code, result.output
    assert words.format(**places) in " ".join(result.stderr.split())
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
