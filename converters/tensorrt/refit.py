"""Gives a loaded TensorRT engine the weights its graph has now, such as those with a LoRA, without building it again.

It needs a GPU, and plans built as refittable. It has been run against a stand-in of TensorRT alone.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

from ...schemas.errors import EngineError
from ...schemas.messages import listed
from ..export.graph_files import load_graph
from .backend import MESSAGES, Backend, logger_of


def refit(backend: Backend, engine: Any, graph: Path) -> int:
    """Give `engine` every weight of the ONNX file `graph`, read from where that says; returns how many the engine has.

    Weights are set whole, not added to: going back to a file that was there before gives what was there before.
    Raises EngineError, and leaves the engine as it was, when the engine has weights that the graph does not, or
    TensorRT does not take them."""
    trt, logger = backend.module, logger_of(backend)
    MESSAGES.clear()
    refitter = trt.Refitter(engine, logger)
    held = set(refitter.get_all_weights())
    if not held:
        raise EngineError(f"{graph}: its engine cannot be given weights; build it with refittable=True")
    foreign = sorted(held - set(_weights(load_graph(graph))))
    if foreign:
        raise EngineError(f"{graph}: its engine is of another graph, with weights {listed(foreign)}; build it again")
    source = trt.OnnxParserRefitter(refitter, logger)
    if not source.refit_from_file(str(graph)):
        raise EngineError(f"{graph}: its weights were not taken: {MESSAGES.reason}")
    missing = sorted(refitter.get_missing_weights())
    if missing:
        raise EngineError(f"{graph}: its engine misses weights: {listed(missing)}; build it again")
    if not refitter.refit_cuda_engine():
        raise EngineError(f"{graph}: its weights were not taken: {MESSAGES.reason}")
    return len(held)


def _weights(model: onnx.ModelProto) -> Iterator[str]:
    """Names that TensorRT counts as weights: initialisers, and the outputs of Constant nodes."""
    for tensor in model.graph.initializer:
        yield tensor.name
    for node in model.graph.node:
        if node.op_type == "Constant":
            yield from node.output
