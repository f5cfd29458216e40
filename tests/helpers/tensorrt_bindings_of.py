"""The real bindings of TensorRT 10 and 11, which import over libraries that are empty: what calls they have.

Object creation gives nothing there, but classes, members and enums are those of a real installation.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

BINDINGS = ("10.13.3.9", "10.16.1.11", "11.4.0.106")
SYMBOLS = """createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL
createNvOnnxParserRefitter_INTERNAL createNvOnnxParser_INTERNAL getBuilderPluginRegistry getNvOnnxParserVersion
getPluginRegistry initLibNvInferPlugins getInferLibVersion""".split()
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")


def missing(module: Any, names: set[str]) -> set[str]:
    lacking = set()
    for name in names:
        owner = module
        for part in name.split("."):
            owner = getattr(owner, part, None)
        if owner is None:
            lacking.add(name)
    return lacking


def unpack_bindings(root: Path) -> Path:
    """Wheels of TensorRT's bindings, 1.3 MB each, unpacked beside libraries that are empty."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("takes a C compiler on Linux to make empty libraries")
    wheels = root / "wheels"
    download = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--retries",
        "1",
        "--dest",
        str(wheels),
    ]
    for version in BINDINGS:
        package = f"tensorrt-cu13-bindings=={version}"
        if subprocess.run([*download, package], capture_output=True, check=False, timeout=60).returncode:
            pytest.skip(f"no {package} for this Python, or no package index in reach")
        with zipfile.ZipFile(next(wheels.glob(f"*-{version}-*.whl"))) as wheel:
            wheel.extractall(root / version)
    source = root / "empty.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS))
    for major in {version.split(".")[0] for version in BINDINGS}:
        (root / major).mkdir()
        for name in LIBRARIES:
            soname = f"lib{name}.so.{major}"
            options = ["-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", str(root / major / soname)]
            subprocess.run([compiler, *options, str(source)], check=True)
    return root


SCRIPT = """
import json, sys
import tensorrt_bindings as trt
from helpers.tensorrt_bindings_of import missing
print(json.dumps({
    "version": trt.__version__,
    "missing": sorted(missing(trt, set(sys.argv[1:]))),
    "takes a config": "IRuntimeConfig" in trt.ICudaEngine.create_execution_context.__doc__,
    "captures itself": hasattr(trt, "CudaGraphStrategy"),
}))
"""


def look(bindings: Path, version: str, names: Iterable[str]) -> dict[str, Any]:
    """The `names` that the bindings of `version` lack. It runs apart: a process can have one TensorRT."""
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(bindings / version.split(".")[0]),
        "PYTHONPATH": os.pathsep.join([str(bindings / version), str(Path(__file__).parent), *sys.path]),
    }
    command = [sys.executable, "-c", SCRIPT, *sorted(names)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return found
