"""The engines that run bundles: one table with the name, the devices and the constructor of each.

The module imports no engine and no numpy until an engine is made, so the command line can read the names for its help.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from ...schemas.callbacks import Say, ignored
from ...schemas.errors import EngineError, UsageError, reraise_interrupt
from ...schemas.precision import Precision
from ...storage.install_hint import install_hint
from . import cpu_flags

if TYPE_CHECKING:
    from ...schemas.precision import Backend
    from ...storage.bundle import Bundle
    from .protocol import Engine
    from .tensorrt.tensorrt_engine import Refit

GRAPHS_FOR = "onnxruntime"  # the manifest's name for plain ONNX graphs, which every engine of the table reads
AUTO = "auto"  # the name that stands for the first engine of CHOICES that can run


@dataclass(frozen=True)
class EngineOptions:
    """The options of all engines; an engine ignores those that it does not have.

    `device` is "cpu" or "cuda". `threads=None` leaves the number to OMP_NUM_THREADS, and without it to the engine.
    `allow_cpu` lets ONNX Runtime compute on the CPU what it cannot compute on the GPU. `memory_budget` is the GPU
    memory in bytes that all stages in TensorRT may take together; None means all that is free. With `refit`, TensorRT
    also runs plans built from other weights. `cuda_graph`, `tf32` and `say` are those of `OnnxRuntimeEngine`."""

    device: str = "cpu"
    threads: int | None = None
    allow_cpu: bool = False
    memory_budget: int | None = None
    refit: "Refit | None" = None
    cuda_graph: bool = True
    tf32: bool = False
    say: Say = ignored


MakeEngine = Callable[["Bundle", EngineOptions], "Engine"]


@dataclass(frozen=True)
class EngineInfo:
    """One engine of the table. `library` executes the graphs, `devices` are those it runs on, and `make` opens a bundle
    with it. `probed` is False where another entry tells `cascadekit doctor` the same."""

    library: str
    devices: tuple[str, ...]
    make: MakeEngine
    probed: bool = True


def _onnxruntime(
    bundle: "Bundle", given: EngineOptions, *, mapped: bool = False, device: str | None = None
) -> "Engine":
    from .onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(
        bundle,
        device or given.device,
        mapped=mapped,
        threads=given.threads,
        allow_cpu=given.allow_cpu,
        cuda_graph=given.cuda_graph,
        tf32=given.tf32,
        say=given.say,
    )


def _openvino(bundle: "Bundle", given: EngineOptions, *, precision: Precision | None = None) -> "Engine":
    from .openvino import OpenVinoEngine

    return OpenVinoEngine(bundle, given.device, precision=precision, threads=given.threads)


def _torch(
    bundle: "Bundle", given: EngineOptions, *, precision: Precision | None = None, compiled: bool = False
) -> "Engine":
    require_torch()
    from .pytorch.torch_engine import PyTorchEngine

    return PyTorchEngine(bundle, given.device, precision=precision, compiled=compiled, threads=given.threads)


def _aotinductor(bundle: "Bundle", given: EngineOptions) -> "Engine":
    require_torch()
    from .pytorch.package_engine import PackageEngine

    return PackageEngine(bundle, given.device, threads=given.threads)


def _tensorrt(bundle: "Bundle", given: EngineOptions, *, backend: "Backend") -> "Engine":
    from .tensorrt.host import open_host
    from .tensorrt.tensorrt_engine import TensorRTEngine

    return TensorRTEngine(bundle, open_host(backend), memory_budget=given.memory_budget, refit=given.refit)


def require_torch() -> None:
    """Raise EngineError when PyTorch is not installed."""
    try:
        import_module("torch")
    except ImportError as error:
        reraise_interrupt(error)
        raise EngineError(f"PyTorch is not installed: {install_hint('torch')}") from error


# TensorRT runs on the GPU whatever `EngineOptions.device` is.
ENGINES: Mapping[str, EngineInfo] = {
    "onnxruntime": EngineInfo("onnxruntime", ("cpu", "cuda"), _onnxruntime),
    "onnxruntime-mapped": EngineInfo("onnxruntime", ("cpu", "cuda"), partial(_onnxruntime, mapped=True), probed=False),
    "onnxruntime-tensorrt": EngineInfo("onnxruntime", ("cuda",), partial(_onnxruntime, device="tensorrt")),
    "openvino": EngineInfo("openvino", ("cpu",), _openvino),
    "openvino-bf16": EngineInfo("openvino", ("cpu",), partial(_openvino, precision=Precision.BF16)),
    "torch": EngineInfo("torch", ("cpu", "cuda"), _torch),
    "torch-bf16": EngineInfo("torch", ("cpu", "cuda"), partial(_torch, precision=Precision.BF16), probed=False),
    "torch-compiled": EngineInfo("torch", ("cpu", "cuda"), partial(_torch, compiled=True), probed=False),
    "aotinductor": EngineInfo("torch", ("cpu", "cuda"), _aotinductor),
    "tensorrt-rtx": EngineInfo("tensorrt-rtx", ("cuda",), partial(_tensorrt, backend="tensorrt-rtx")),
    "tensorrt": EngineInfo("tensorrt", ("cuda",), partial(_tensorrt, backend="tensorrt")),
}


def _has_plans(bundle: "Bundle", backend: "Backend", device: str = "cuda") -> bool:
    """True if every stage that `generate` needs has plans of `backend` that can run on `device` here."""
    if not any(plan.backend == backend for entry in bundle.manifest.stages.values() for plan in entry.plans):
        return False
    try:
        if backend != "aotinductor":
            from .tensorrt.host import open_host
            from .tensorrt.tensorrt_engine import plans_on

            return plans_on(bundle, open_host(backend)).make_images()
        require_torch()
        from .pytorch.package_choice import packages_on

        return packages_on(bundle, device).make_images()
    except EngineError:
        return False


# Multiply-adds of an image from which a bf16 engine is worth its start: compiling every graph, or importing torch.
# docs/gpu.md has the measurement. The lite cascade needs seventy times as many at 1024x1024.
WORTH_A_START = 5e11


def _is_worth_a_start(bundle: "Bundle") -> bool:
    from ...schemas.passes import usual_work

    return usual_work(bundle.manifest) >= WORTH_A_START


def _openvino_computes_bf16(bundle: "Bundle") -> bool:
    """True if the CPU multiplies bf16, the graphs are not in bf16, and their weights are files beside them.

    False for small networks. OpenVINO knows what its kernels can do, but importing it takes half a second."""
    if not cpu_flags.may_compute_bf16() or not _is_worth_a_start(bundle):
        return False
    from ...schemas.manifest import MAIN_GRAPH
    from ...storage.hub_cache_links import can_do_without
    from . import openvino

    entries = bundle.manifest.stages.values()
    return openvino.multiplies_bf16() and all(
        entry.precision is not Precision.BF16 and can_do_without(bundle.root / entry.graphs[MAIN_GRAPH].path)
        for entry in entries
    )


def _torch_computes_bf16(bundle: "Bundle") -> bool:
    """True if the CPU multiplies bf16, no stage is quantised, and torch is installed.

    False for small networks. torch comes last, because importing it takes seconds."""
    from ...schemas.quantization import Quantization

    if not cpu_flags.multiplies_bf16() or not _is_worth_a_start(bundle):
        return False
    if any(entry.quantization is not Quantization.NONE for entry in bundle.manifest.stages.values()):
        return False
    try:
        require_torch()
    except EngineError:
        return False
    return True


@dataclass(frozen=True)
class EngineChoice:
    """An engine that "auto" considers on a device, if it can run the bundle here."""

    name: str
    device: str
    can_run: Callable[["Bundle"], bool]


# The fastest first, for each device, as far as it was measured; docs/gpu.md and docs/generate.md have the figures.
# Plans and packages were not compared: a user who built them wants them to be used.
CHOICES: tuple[EngineChoice, ...] = (
    EngineChoice("tensorrt", "cuda", partial(_has_plans, backend="tensorrt")),
    EngineChoice("tensorrt-rtx", "cuda", partial(_has_plans, backend="tensorrt-rtx")),
    EngineChoice("aotinductor", "cuda", partial(_has_plans, backend="aotinductor")),
    EngineChoice("openvino-bf16", "cpu", _openvino_computes_bf16),  # 11.7 s for an image; onnxruntime took 22.8 s
    EngineChoice("aotinductor", "cpu", partial(_has_plans, backend="aotinductor", device="cpu")),
    EngineChoice("torch-bf16", "cpu", _torch_computes_bf16),  # 3.95 s for a prior step; openvino-bf16 took 2.90 s
)
DEFAULT = "onnxruntime"  # the engine of "auto" if none of CHOICES can run


def make_engine(
    name: str,
    bundle: "Bundle",
    device: str = "cpu",
    threads: int | None = None,
    *,
    allow_cpu: bool = False,
    memory_budget: int | None = None,
    refit: "Refit | None" = None,
    cuda_graph: bool = True,
    tf32: bool = False,
    say: Say = ignored,
) -> "Engine":
    """The engine called `name`, or the one that "auto" takes here, for `bundle`; see `EngineOptions`.

    Raises UsageError for an unknown name or too few threads. Raises EngineError when the bundle or the device does not
    suit the engine, or a package that the engine needs is not installed."""
    if name not in (*ENGINES, AUTO):
        raise UsageError(f"engine {name!r}: expected {AUTO}, {', '.join(ENGINES)}")
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads: expected at least 1")
    if GRAPHS_FOR not in bundle.manifest.engines:
        raise EngineError(f"{bundle.root}: made for {', '.join(bundle.manifest.engines)}; expected {GRAPHS_FOR}")
    if name == AUTO:
        able = (choice.name for choice in CHOICES if choice.device == device and choice.can_run(bundle))
        name = next(able, DEFAULT)
    options = EngineOptions(
        device, threads, allow_cpu, memory_budget, refit=refit, cuda_graph=cuda_graph, tf32=tf32, say=say
    )
    return ENGINES[name].make(bundle, options)
