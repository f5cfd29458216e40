"""The engines that run bundles, by the names people choose them by."""

from collections.abc import Callable, Mapping

from ...schemas.errors import EngineError, UsageError
from ..bundle import Bundle
from .base import Engine
from .onnxruntime import OnnxRuntimeEngine
from .openvino import OpenVinoEngine, multiplies_bf16

GRAPHS_FOR = "onnxruntime"  # what a manifest calls plain ONNX graphs; all of these engines read them

Maker = Callable[[Bundle, str, int | None], Engine]

ENGINES: Mapping[str, Maker] = {
    "onnxruntime": lambda bundle, device, threads: OnnxRuntimeEngine(bundle, device, threads=threads),
    "onnxruntime-mapped": lambda bundle, device, threads: OnnxRuntimeEngine(
        bundle, device, memory="mapped", threads=threads
    ),
    "openvino": lambda bundle, device, threads: OpenVinoEngine(bundle, device, threads=threads),
    "openvino-bf16": lambda bundle, device, threads: OpenVinoEngine(bundle, device, precision="bf16", threads=threads),
}

# What "auto" takes: the first whose condition holds.
AUTO: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("openvino-bf16", lambda device: device == "cpu" and multiplies_bf16()),
    ("onnxruntime", lambda device: True),
)


def make_engine(name: str, bundle: Bundle, device: str = "cpu", threads: int | None = None) -> Engine:
    """The engine called `name`, or the one that "auto" takes here, for `bundle`; `threads` None leaves their number
    to it.

    Raises UsageError for an unknown name, EngineError when the bundle or the device is not for it, or what it needs
    is not installed."""
    if name not in (*ENGINES, "auto"):
        raise UsageError(f"engine {name!r}: expected auto, {', '.join(ENGINES)}")
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads: expected at least 1")
    if GRAPHS_FOR not in bundle.manifest.engines:
        raise EngineError(f"{bundle.root}: made for {', '.join(bundle.manifest.engines)}; known are {GRAPHS_FOR}")
    if name == "auto":
        name = next(engine for engine, holds in AUTO if holds(device))
    return ENGINES[name](bundle, device, threads)
