"""Programs to compare with that lie beside the environment, not in it: what must not be installed with transformers."""

import os
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

ORACLES = Path(sys.prefix) / "oracles"
QUANTISERS = ORACLES / "quantisers"  # torchao, bitsandbytes and LyCORIS, as `make matrix` installs them
COMFYUI = ORACLES / "ComfyUI"  # a checkout of ComfyUI, where somebody has put one
TESTS = Path(__file__).parents[1]


def comfyui() -> str:
    """The version of the checkout of ComfyUI, or ""."""
    path = COMFYUI / "comfyui_version.py"
    found = re.search(r'__version__ = "(.+)"', path.read_text()) if path.is_file() else None
    return found[1] if found else ""


def quantiser(package: str) -> str:
    """The version of a package in QUANTISERS, or ""."""
    found = {distribution.name: distribution.version for distribution in distributions(path=[str(QUANTISERS)])}
    return found.get(package, "")


def run_alone(module: str, *arguments: object, path: Path) -> None:
    """Run a module of tests/ in a process of its own, in which packages in `path` can be imported too."""
    paths = [str(TESTS), os.environ.get("PYTHONPATH", ""), str(path)]
    command = [sys.executable, "-m", module, *map(str, arguments)]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    ended = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=900, cwd=TESTS)
    assert ended.returncode == 0, ended.stderr[-4000:]
