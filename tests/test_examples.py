"""The example scripts run on the tiny cascade, and import public names alone."""

import ast
import runpy
import sys
from pathlib import Path

import pytest

import cascadekit

EXAMPLES = Path(__file__).parents[1] / "examples"
PROMPT = "a tiny cascade"
ARGUMENTS = {
    "convert_checkpoint": ("{tiny}/original", "{new}/model"),
    "export_bundle": ("{tiny}/model", "{new}/bundle"),
    "generate_image": ("{tiny}/bundle", PROMPT, "{new}/image.png"),
    "vary_guidance": ("{tiny}/bundle", PROMPT, "{new}/sheet.png"),
    "many_prompts": ("{tiny}/bundle", "{new}/images"),
    "make_lora": ("{tiny}/original/stage_c.safetensors", "{new}/style.safetensors"),
}
RUN_ELSEWHERE = {"triton_client", "triton_load"}  # tests/converters/triton; they need a server and its clients
MADE = {"convert_checkpoint": "model/model_index.json", "export_bundle": "bundle/cascade.json"}


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(ARGUMENTS) | RUN_ELSEWHERE


@pytest.mark.parametrize("name", ARGUMENTS)
def test_it_runs(name: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [each.format(tiny=tiny, new=tmp_path) for each in ARGUMENTS[name]]
    script = str(EXAMPLES / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(script, run_name="__main__")
    assert (tmp_path / MADE[name] if name in MADE else Path(arguments[-1])).exists()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_it_imports_public_names_alone(name: str) -> None:
    for node in ast.walk(ast.parse((EXAMPLES / f"{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cascadekit"):
            assert node.module == "cascadekit", ast.unparse(node)
            assert {alias.name for alias in node.names} <= set(cascadekit.__all__)
