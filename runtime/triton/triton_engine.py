"""The engine of the Triton model `cascade`: each stage is another model of the same server."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...schemas.manifest import MAIN_GRAPH
from ...schemas.precision import Precision
from ...schemas.stages import Stage
from ...storage.bundle import Bundle, open_bundle
from ..cascade import Cascade
from ..engines.protocol import HostRunner, PortSpec, StageRunner, Tensors, complete_inputs
from ..text.tokenizer import ClipTokenizer

Infer = Callable[[str, Tensors, Sequence[str]], dict[str, NDArray[Any]]]
"""Called with a model's name, its inputs, and the names of the outputs, which it returns."""


class TritonEngine:
    """An engine for every stage of `bundle`, whose graphs are models of a server; `infer` asks one of them.

    The stages run as whole graphs. Two graphs would exchange the keys and values of every attention in each step."""

    name = "triton"
    precision: Precision | None = None
    in_parts: tuple[Stage, ...] = ()

    def __init__(self, bundle: Bundle, infer: Infer) -> None:
        self.bundle = bundle
        self._infer = infer

    def graphs(self, stage: Stage) -> tuple[str, ...]:
        return (MAIN_GRAPH,)

    def load(self, stage: Stage, graph: str = MAIN_GRAPH) -> StageRunner:
        return TritonStage(stage, self.bundle, self._infer)


class TritonStage(HostRunner):
    """One stage as a model of the server, which has its weights in memory as long as it runs."""

    def __init__(self, stage: Stage, bundle: Bundle, infer: Infer) -> None:
        self._stage = stage
        self._entry = bundle.entry(stage)
        self._infer = infer

    def __call__(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        given = complete_inputs(self._stage, self._entry.inputs, inputs)
        tensors = {port.name: np.ascontiguousarray(_on_wire(port, given[port.name])) for port in self._entry.inputs}
        return self._infer(str(self._stage), tensors, [port.name for port in self._entry.outputs])

    def close(self) -> None:
        pass


def wire_dims(port: PortSpec) -> tuple[int | str, ...]:
    """The dims of one row of a port as clients send it: a model's config has no tensors of a batch of numbers."""
    return port.dims[1:] or (1,)


def _on_wire(port: PortSpec, array: NDArray[Any]) -> NDArray[Any]:
    return array if len(port.dims) > 1 else array[:, None]


def open_cascade(folder: Path, infer: Infer, *, rows: int) -> Cascade:
    """The cascade of the manifest in `folder`; `rows` is that of `Cascade.open`."""
    bundle = open_bundle(folder)
    tokenizer = ClipTokenizer.open(bundle.tokenizer, bundle.manifest.text_rows)
    return Cascade(TritonEngine(bundle, infer), bundle.manifest, tokenizer, rows=rows)
