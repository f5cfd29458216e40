"""The engines that run bundles, by the names people choose them by."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...schemas.bundle import MAIN_GRAPH
from ...schemas.errors import EngineError, UsageError
from ...storage.bundle import Bundle
from ...storage.hub_cache_links import can_do_without
from .base import Engine
from .onnxruntime import OnnxRuntimeEngine
from .openvino import OpenVinoEngine, multiplies_bf16
from .tensorrt.engine import Refit, has_plans, make_tensorrt

GRAPHS_FOR = "onnxruntime"  # what a manifest calls plain ONNX graphs; all of these engines read them


@dataclass(frozen=True)
class EngineOptions:
    """What an engine may be told; each takes what concerns it. `threads` None leaves their number to it.

    `allow_cpu` lets ONNX Runtime compute on the CPU what it cannot on the GPU. `memory_budget` is the bytes of GPU
    memory that TensorRT's stages may take together, None what is free; with `refit` plans may be of other weights."""

    device: str = "cpu"
    threads: int | None = None
    allow_cpu: bool = False
    memory_budget: int | None = None
    refit: Refit | None = None


Maker = Callable[[Bundle, EngineOptions], Engine]


def _onnxruntime(bundle: Bundle, given: EngineOptions, memory: str = "fast", device: str | None = None) -> Engine:
    return OnnxRuntimeEngine(
        bundle, device or given.device, memory=memory, threads=given.threads, allow_cpu=given.allow_cpu
    )


# TensorRT runs on a GPU whatever the device is said to be.
ENGINES: Mapping[str, Maker] = {
    "onnxruntime": _onnxruntime,
    "onnxruntime-mapped": lambda bundle, given: _onnxruntime(bundle, given, memory="mapped"),
    "onnxruntime-tensorrt": lambda bundle, given: _onnxruntime(bundle, given, device="tensorrt"),
    "openvino": lambda bundle, given: OpenVinoEngine(bundle, given.device, threads=given.threads),
    "openvino-bf16": lambda bundle, given: OpenVinoEngine(
        bundle, given.device, precision="bf16", threads=given.threads
    ),
    "tensorrt-rtx": lambda bundle, given: make_tensorrt(bundle, "tensorrt-rtx", given.memory_budget, given.refit),
    "tensorrt": lambda bundle, given: make_tensorrt(bundle, "tensorrt", given.memory_budget, given.refit),
}

# What "auto" takes: the first whose condition holds.
AUTO: tuple[tuple[str, Callable[[Bundle, str], bool]], ...] = (
    ("tensorrt", lambda bundle, device: device == "cuda" and has_plans(bundle, "tensorrt")),
    ("tensorrt-rtx", lambda bundle, device: device == "cuda" and has_plans(bundle, "tensorrt-rtx")),
    ("openvino-bf16", lambda bundle, device: device == "cpu" and multiplies_bf16() and _opens_in_openvino(bundle)),
    ("onnxruntime", lambda bundle, device: True),
)


def _opens_in_openvino(bundle: Bundle) -> bool:
    """Whether its weights lie beside their graphs, or can be brought there; elsewhere OpenVINO reads none."""
    entries = bundle.manifest.stages.values()
    return all(can_do_without(bundle.root / entry.graphs[MAIN_GRAPH].path) for entry in entries)


def make_engine(
    name: str,
    bundle: Bundle,
    device: str = "cpu",
    threads: int | None = None,
    *,
    allow_cpu: bool = False,
    memory_budget: int | None = None,
    refit: Refit | None = None,
) -> Engine:
    """The engine called `name`, or the one that "auto" takes here, for `bundle`; see `EngineOptions`.

    Raises UsageError for an unknown name, EngineError when the bundle or the device is not for it, or what it needs
    is not installed."""
    if name not in (*ENGINES, "auto"):
        raise UsageError(f"engine {name!r}: expected auto, {', '.join(ENGINES)}")
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads: expected at least 1")
    if GRAPHS_FOR not in bundle.manifest.engines:
        raise EngineError(f"{bundle.root}: made for {', '.join(bundle.manifest.engines)}; known are {GRAPHS_FOR}")
    if name == "auto":
        name = next(engine for engine, holds in AUTO if holds(bundle, device))
    return ENGINES[name](bundle, EngineOptions(device, threads, allow_cpu, memory_budget, refit))
