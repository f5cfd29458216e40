"""Programs to compare with that lie beside the environment, not in it: what must not be installed with transformers."""

import os
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

ORACLES = Path(sys.prefix) / "oracles"
QUANTISERS = ORACLES / "quantisers"  # torchao, bitsandbytes and LyCORIS, as `make matrix` installs them
# Checkouts of programs that are no packages, where somebody has put them.
COMFYUI, STABILITY = ORACLES / "ComfyUI", ORACLES / "StableCascade"
TESTS = Path(__file__).parents[1]


def checkouts() -> dict[str, str]:
    """The checkouts that are there, and their versions; Stability's repository has none."""
    path = COMFYUI / "comfyui_version.py"
    version = re.search(r'__version__ = "(.+)"', path.read_text()) if path.is_file() else None
    found = {"ComfyUI": version[1]} if version else {}
    return found | ({"StableCascade": "of 2024"} if (STABILITY / "modules" / "lora.py").is_file() else {})


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
