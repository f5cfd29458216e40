"""Reports the installed packages, the engines that run and build with them, and the packages that are missing."""

import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..schemas.errors import EngineError
from ..schemas.precision import Backend
from ..storage.install_hint import install_hint
from .engines.engine_table import ENGINES, require_torch
from .engines.installed_packages import installed, onnxruntime_conflict, onnxruntimes
from .engines.onnxruntime import import_onnxruntime
from .engines.openvino import import_openvino, multiplies_bf16
from .engines.provider_probe import why_not
from .engines.tensorrt.cuda import Cuda
from .engines.tensorrt.host import import_tensorrt

PACKAGES = (
    "cascadekit",
    "numpy",
    "onnx",
    "openvino",
    "torch",
    "diffusers",
    "transformers",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-bindings",
)
# For each command, the package that it needs besides the base ones, and the extra that installs the package.
TOOLS: Mapping[str, tuple[str, str]] = {
    "export, build": ("onnx", "export"),
    "verify": ("torch", "parity"),
}
SMI = ("nvidia-smi", "--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader,nounits")
OLDEST_RTX = (1, 6)  # older ones have no depthwise convolutions in bf16


@dataclass(frozen=True)
class Gpu:
    """A GPU. `capability` is written as in "sm89", `memory` is in bytes, and `driver` is the driver's version or the
    newest CUDA that the driver can run."""

    name: str
    capability: str
    memory: int
    driver: str


@dataclass(frozen=True)
class Finding:
    """One engine on one device. `builds` says whether plans can be built here, and is None for an engine without plans.
    `lacking` says why the engine does not run."""

    engine: str
    device: str
    version: str | None = None
    builds: bool | None = None
    runs: bool = False
    lacking: str = ""


@dataclass(frozen=True)
class Findings:
    """The whole report. `gpu_problem` is the reason why no GPU can be used; `warnings` are installs to repair."""

    system: str
    python: str
    packages: Mapping[str, str]
    gpu: Gpu | None
    gpu_problem: str
    engines: tuple[Finding, ...]
    lacking_tools: Mapping[str, str]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> Findings:
    """Examine this machine: start every engine for a moment, without a network. Missing parts raise no error.

    Example: `[found.engine for found in examine().engines if found.runs]`"""
    gpu, problem = find_gpu()
    conflict = onnxruntime_conflict()
    named = {name: version for name in PACKAGES if (version := installed(name))}
    return Findings(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        packages=named | onnxruntimes(),
        gpu=gpu,
        gpu_problem=problem,
        engines=tuple(_examine_engines(gpu, problem)),
        lacking_tools={tool: install_hint(extra) for tool, (name, extra) in TOOLS.items() if not installed(name)},
        warnings=(conflict,) if conflict else (),
    )


def _examine_engines(gpu: Gpu | None, gpu_problem: str) -> Iterator[Finding]:
    for name, engine in ENGINES.items():
        for device in engine.devices if engine.probed else ():
            if engine.library in PROBES:
                yield _examine_engine(name, device, engine.library)
            else:
                yield _tensorrt("tensorrt" if name == "tensorrt" else "tensorrt-rtx", gpu, gpu_problem)


def find_gpu() -> tuple[Gpu | None, str]:
    """The first GPU, and the reason why it cannot be used: "" if it can be."""
    try:
        cuda = Cuda()
        device = cuda.device()
        return Gpu(device.name, device.capability, device.memory, f"CUDA {cuda.driver_version()}"), ""
    except EngineError as error:
        return _seen_by_nvidia_smi(), str(error)


def _seen_by_nvidia_smi() -> Gpu | None:
    try:
        answer = subprocess.run(SMI, capture_output=True, text=True, timeout=20, check=True).stdout
        name, capability, mebibytes, driver = (field.strip() for field in answer.splitlines()[0].rsplit(",", 3))
        return Gpu(name, f"sm{capability.replace('.', '')}", int(mebibytes) << 20, driver)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _examine_engine(name: str, device: str, library: str) -> Finding:
    version = None
    try:  # ONNX Runtime's version is that of the module: of two installs only one is there, whatever their metadata say
        version = str(import_onnxruntime("cpu").__version__) if library == "onnxruntime" else installed(library)
        problem = PROBES[library](name, device)
    except EngineError as error:
        problem = str(error)
    return Finding(name, device, version, runs=not problem, lacking=problem)


def _onnxruntime_problem(name: str, device: str) -> str:
    return why_not("tensorrt" if name.endswith("tensorrt") else device)


def _openvino_problem(name: str, device: str) -> str:
    import_openvino().Core()
    slow = name.endswith("bf16") and not multiplies_bf16()
    return "this CPU does not multiply bf16: it would be slow" if slow else ""


def _torch_problem(name: str, device: str) -> str:
    require_torch()
    from .engines.pytorch.device import gpu_problem

    return gpu_problem(device) or ""


# By library: the reason why an engine cannot run on a device, or "". Each raises EngineError without its library.
PROBES: Mapping[str, Callable[[str, str], str]] = {
    "onnxruntime": _onnxruntime_problem,
    "openvino": _openvino_problem,
    "torch": _torch_problem,
}


def _tensorrt(backend: Backend, gpu: Gpu | None, gpu_problem: str) -> Finding:
    try:
        trt = import_tensorrt(backend)
    except EngineError as error:
        return Finding(backend, "cuda", builds=False, lacking=str(error))
    version = str(trt.__version__)
    problem, builds = gpu_problem, backend != "tensorrt" or not gpu_problem  # TensorRT builds on its own GPU alone
    if backend != "tensorrt":
        if tuple(map(int, version.split(".")[:2])) < OLDEST_RTX:
            builds, problem = False, "too old: pip install --upgrade 'tensorrt-rtx>=1.6'"
        targets = [name.lower() for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
        if gpu and not problem and gpu.capability not in targets:
            problem = f"it is for {', '.join(targets)}, this GPU is {gpu.capability}; take tensorrt"
    return Finding(backend, "cuda", version, builds=builds, runs=not problem, lacking=problem)
