"""No library reports that it is used: in a fresh home folder, without a network, nothing is left behind."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cascadekit
from helpers.whole import Whole

ROOT = Path(cascadekit.__file__).parent
LIBRARY_AND_COMMAND = """
import sys
from cascadekit import Cascade
with Cascade.open(sys.argv[2], threads=1) as cascade:
    cascade.generate("a cat", width=64, height=64, prior_steps=1, decoder_steps=1, seed=0)
sys.argv[0] = "cascadekit"
from cascadekit.cli import main
main()
"""
SMALL = ["--size", "64x64", "--prior-steps", "1", "--decoder-steps", "1", "--engine", "onnxruntime", "--threads", "1"]


def alone(home: Path, code: str, *arguments: str) -> list[str]:
    """The files that a process leaves in an empty home folder; cut off from the network where that can be done."""
    cut_off = ["unshare", "-n"] if os.getuid() == 0 and shutil.which("unshare") else []
    if cut_off and subprocess.run([*cut_off, "true"], capture_output=True, check=False).returncode:
        cut_off = []
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if "TELEMETRY" not in name and "XDG" not in name}
    environment = {**kept, "HOME": str(home), "TMPDIR": str(home)}
    call = [*cut_off, sys.executable, "-c", code, *arguments]
    done = subprocess.run(call, capture_output=True, text=True, env=environment, check=False, cwd=home.parent)
    assert done.returncode == 0, done.stderr
    return [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()]


def test_library_and_command_leave_nothing_in_the_home_folder(whole: Whole, tmp_path: Path) -> None:
    image = tmp_path / "x.png"
    left = alone(tmp_path / "home", LIBRARY_AND_COMMAND, "generate", str(whole.bundle), "x", "-o", str(image), *SMALL)
    # A name that says: the note about this bundle, never verified, was shown.
    assert [path for path in left if not path.startswith(".cache/cascadekit/unverified/")] == []
    assert image.is_file()


def test_huggingface_hub_reports_nothing() -> None:
    code = "import cascadekit; from huggingface_hub import constants; assert constants.HF_HUB_DISABLE_TELEMETRY"
    environment = {name: value for name, value in os.environ.items() if "TELEMETRY" not in name}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_what_the_user_says_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from cascadekit.runtime.engines.telemetry import switch_off_telemetry

    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    switch_off_telemetry()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"


def test_one_function_imports_onnxruntime() -> None:
    importers = [
        str(path.relative_to(ROOT))
        for floor in ("schemas", "runtime", "converters", "cli")
        for path in (ROOT / floor).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Import) and any(name.name.split(".")[0] == "onnxruntime" for name in node.names))
        or (isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("onnxruntime"))
    ]
    assert importers == ["runtime/engines/onnxruntime.py"]
