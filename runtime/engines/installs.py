"""What is installed of the packages that engines need, and what to do where it does not go together."""

from importlib.metadata import PackageNotFoundError, version

# All of them put their files into one folder, `onnxruntime/`: the one installed last wins, and removing one breaks the
# other (github.com/microsoft/onnxruntime/issues/26996).
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
    """What is wrong, and how to mend it, where several are installed; None where it is one or none."""
    found = onnxruntimes()
    if len(found) < 2:
        return None
    extra = "gpu" if "onnxruntime-gpu" in found else "cpu"
    names = " and ".join(f"{name} {number}" for name, number in found.items())
    return (
        f"{names} are installed together and overwrite each other's files; "
        f"pip uninstall -y {' '.join(found)}, then pip install 'cascadekit[{extra}]'"
    )
