"""What is installed here, which engines can be built and run with it, and what to install for the rest."""

import platform
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..schemas.bundle import Backend
from ..schemas.errors import EngineError
from .engines.installs import installed, onnxruntime_conflict, onnxruntimes
from .engines.onnxruntime import PROVIDERS, import_onnxruntime, provider_problem
from .engines.openvino import import_openvino, multiplies_bf16
from .engines.tensorrt.cuda import Cuda
from .engines.tensorrt.nvidia import import_tensorrt

# An ONNX model in opset 20: y = Identity(x), float32 [1]. What a session of it starts with tells what there is.
PROBE = bytes.fromhex(
    "08093a370a100a017812017922084964656e746974791201675a0f0a0178120a0a08080112040a020801620f0a0179120a0a08080112"
    "040a02080142040a001014"
)
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
# By command, the package it takes besides the base ones, and the extra that brings it.
TOOLS: Mapping[str, tuple[str, str]] = {
    "export, build": ("onnx", "export"),
    "verify": ("torch", "parity"),
}
SMI = ("nvidia-smi", "--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader,nounits")
OLDEST_RTX = (1, 6)  # before, it had no depthwise convolutions in bf16


@dataclass(frozen=True)
class Gpu:
    """`capability` as in "sm89", `memory` in bytes, `driver` its version or the newest CUDA it can run."""

    name: str
    capability: str
    memory: int
    driver: str


@dataclass(frozen=True)
class Finding:
    """Of an engine: its version, whether it builds plans here (None: it needs none) and runs, and what is lacking."""

    engine: str
    device: str
    version: str | None
    builds: bool | None
    runs: bool
    lacking: str = ""


@dataclass(frozen=True)
class Findings:
    """Everything there is to say. `gpu_problem` is why there is no GPU to be used, `warnings` what should be mended."""

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
    """Look at everything; starts engines for a moment, loads no network. Never raises for what is missing."""
    gpu, problem = find_gpu()
    conflict = onnxruntime_conflict()
    named = {name: version for name in PACKAGES if (version := installed(name))}
    return Findings(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        packages=named | onnxruntimes(),
        gpu=gpu,
        gpu_problem=problem,
        engines=(
            *(_onnxruntime(name, device) for name, device in ONNXRUNTIME_ENGINES),
            *_openvino(),
            _tensorrt("tensorrt-rtx", gpu, problem),
            _tensorrt("tensorrt", gpu, problem),
        ),
        lacking_tools={
            tool: f"pip install 'cascadekit[{extra}]'" for tool, (name, extra) in TOOLS.items() if not installed(name)
        },
        warnings=(conflict,) if conflict else (),
    )


def find_gpu() -> tuple[Gpu | None, str]:
    """The first GPU, and what hinders its use: there may be one that cannot be used, and none with the reason."""
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


ONNXRUNTIME_ENGINES = (("onnxruntime", "cpu"), ("onnxruntime", "cuda"), ("onnxruntime-tensorrt", "cuda"))


def _onnxruntime(name: str, device: str) -> Finding:
    """Its providers are listed whether they can start or not: only a session shows it."""
    versions: list[str] = []  # the module's: of two installs one is there, whatever the other's metadata say
    kind = "tensorrt" if name.endswith("tensorrt") else device
    wanted = PROVIDERS[kind][0]

    def lacking() -> str:
        versions.append(str(import_onnxruntime("cpu").__version__))
        ort = import_onnxruntime(kind)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        try:
            session = ort.InferenceSession(PROBE, options, providers=[wanted], enable_fallback=0)
        except Exception as error:  # a class of its own for each status code
            return provider_problem(ort, wanted) or " ".join(str(error).split())
        if wanted in session.get_providers():
            return ""
        return provider_problem(ort, wanted) or f"its {wanted} does not start; see nvidia-smi"

    found = _tried(name, device, None, None, lacking)
    return replace(found, version=next(iter(versions), None))


def _openvino() -> tuple[Finding, ...]:
    version = installed("openvino")

    def lacking() -> str:
        import_openvino().Core()
        return ""

    def lacking_bf16() -> str:
        return lacking() or ("" if multiplies_bf16() else "this CPU does not multiply bf16: it would be slow")

    return (
        _tried("openvino", "cpu", version, None, lacking),
        _tried("openvino-bf16", "cpu", version, None, lacking_bf16),
    )


def _tensorrt(backend: Backend, gpu: Gpu | None, problem: str) -> Finding:
    try:
        trt = import_tensorrt(backend)
    except EngineError as error:
        return Finding(backend, "cuda", None, False, False, str(error))
    version = str(trt.__version__)
    if backend == "tensorrt":
        return Finding(backend, "cuda", version, not problem, not problem, problem)
    if tuple(map(int, version.split(".")[:2])) < OLDEST_RTX:
        return Finding(backend, "cuda", version, False, False, "too old: pip install --upgrade 'tensorrt-rtx>=1.6'")
    targets = [name.lower() for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    if gpu and not problem and gpu.capability not in targets:
        problem = f"it is for {', '.join(targets)}, this GPU is {gpu.capability}; take tensorrt"
    return Finding(backend, "cuda", version, True, not problem, problem)


def _tried(name: str, device: str, version: str | None, builds: bool | None, lacking: Callable[[], str]) -> Finding:
    try:
        problem = lacking()
    except EngineError as error:
        problem = str(error)
    return Finding(name, device, version, builds, not problem, problem)
