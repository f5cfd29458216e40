"""Gives a loaded TensorRT engine the current weights of its graph, such as those with a LoRA, without a new build.

It needs a GPU, and plans built with ``refittable=True``. It has only been run against a stand-in for TensorRT.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

from ...schemas.errors import EngineError
from ...schemas.messages import listed
from ..export.graph_files import load_graph
from .backend import MESSAGES, InstalledTensorRT, logger_of


def refit(backend: InstalledTensorRT, engine: Any, graph: Path) -> int:
    """Give `engine` every weight of the ONNX file `graph`; returns the number of weights of the engine.

    Weights are replaced, so an earlier weights file gives the earlier engine again. Raises EngineError and leaves the
    engine unchanged when it has weights that the graph lacks, or when TensorRT refuses the weights."""
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
        raise EngineError(f"{graph}: TensorRT refused its weights: {MESSAGES.reason}")
    missing = sorted(refitter.get_missing_weights())
    if missing:
        raise EngineError(f"{graph}: its engine lacks weights: {listed(missing)}; build it again")
    if not refitter.refit_cuda_engine():
        raise EngineError(f"{graph}: TensorRT refused its weights: {MESSAGES.reason}")
    return len(held)


def _weights(model: onnx.ModelProto) -> Iterator[str]:
    """The names of TensorRT's weights: initialisers, and the outputs of Constant nodes."""
    for tensor in model.graph.initializer:
        yield tensor.name
    for node in model.graph.node:
        if node.op_type == "Constant":
            yield from node.output
