"""The installed packages of the engines, and how to repair installs that do not work together."""

import ctypes
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ...storage.install_hint import install_hint

# All of these put their files into the folder `onnxruntime/`: the one installed last wins, and removing one breaks the
# others (github.com/microsoft/onnxruntime/issues/26996).
ONNXRUNTIMES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "onnxruntime-rocm",
    "onnxruntime-migraphx",
)


def installed(package: str) -> str | None:
    """The version of a distribution; None when it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def onnxruntimes() -> dict[str, str]:
    """The distributions of ONNX Runtime that are installed, with their versions."""
    return {name: found for name in ONNXRUNTIMES if (found := installed(name))}


def onnxruntime_conflict() -> str | None:
    """A message that says how to repair several installed ONNX Runtimes; None where at most one is installed."""
    found = onnxruntimes()
    if len(found) < 2:
        return None
    extra = "gpu" if "onnxruntime-gpu" in found else "cpu"
    names = " and ".join(f"{name} {number}" for name, number in found.items())
    return (
        f"{names} are installed together and overwrite each other's files; "
        f"pip uninstall -y {' '.join(found)}, then {install_hint(extra)}"
    )


def provider_problem(ort: Any, provider: str) -> str | None:
    """The system's reason why the library of a GPU provider cannot be loaded; None if it loads or does not exist."""
    folder = Path(ort.__file__).parent / "capi"
    pattern = "onnxruntime_providers_{}.dll" if sys.platform == "win32" else "libonnxruntime_providers_{}.so"
    library = folder / pattern.format(provider.removesuffix("ExecutionProvider").lower())
    if not library.is_file():
        return None
    try:
        ctypes.CDLL(str(folder / pattern.format("shared")), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library))
    except OSError as error:
        return str(error)
    return None
