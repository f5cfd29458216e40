"""Runs the graphs of a bundle with OpenVINO on the CPU."""

import sys
from typing import Any

import numpy as np

from ...schemas.errors import EngineError, reraise_interrupt
from ...schemas.manifest import MAIN_GRAPH, GraphEntry
from ...schemas.messages import one_line
from ...schemas.precision import Precision
from ...schemas.stages import Stage
from ...storage.bundle import Bundle
from ...storage.hub_cache_links import without_links
from ...storage.install_hint import install_hint
from ..memory.give_back import give_back_memory
from .environment_threads import environment_threads
from .protocol import REASON_LENGTH, HostRunner, Outputs, Tensors, complete_inputs

PERIODIC = ("Sin", "Cos")
TELEMETRY = "openvino_telemetry"


class OpenVinoEngine:
    """An engine for every stage of `bundle`, on the CPU.

    Graphs are computed in fp32, or in `precision`. `threads=None` leaves their number to OMP_NUM_THREADS, and
    without it to OpenVINO. The files of the weights are mapped into memory."""

    def __init__(
        self, bundle: Bundle, device: str = "cpu", *, precision: Precision | None = None, threads: int | None = None
    ) -> None:
        """Raises EngineError for another device, or when OpenVINO is not installed."""
        if device != "cpu":
            raise EngineError(f'device {device!r}: engine openvino runs on cpu only; for cuda set engine="onnxruntime"')
        self.bundle = bundle
        self.name = f"openvino-{precision}" if precision else "openvino"
        self.precision = precision
        self._ov = import_openvino()
        self._core = self._ov.Core()
        self._options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision or "f32"}
        if allowed := threads or environment_threads():
            self._options["INFERENCE_NUM_THREADS"] = allowed

    def graphs(self, stage: Stage) -> tuple[str, ...]:
        return tuple(self.bundle.entry(stage).graphs)

    def load(self, stage: Stage, graph: str = MAIN_GRAPH) -> "OpenVinoStage":
        entry = self.bundle.entry(stage)
        path = self.bundle.graph(stage, graph)
        require_no_bf16(stage, entry.precision)
        try:
            with without_links(path) as alone:
                model = self._core.read_model(str(alone))
                head = _cut_at_sines(self._ov, model) if self.precision else None
                head = head and self._core.compile_model(
                    head, "CPU", {**self._options, "INFERENCE_PRECISION_HINT": "f32"}
                )
                body = self._core.compile_model(model, "CPU", self._options)
        except Exception as error:  # OpenVINO raises RuntimeError for everything
            raise EngineError(f"{path}: openvino cannot load the {stage}: {one_line(error, REASON_LENGTH)}") from error
        give_back_memory()
        return OpenVinoStage(stage, entry.graphs[graph], head, body)


class OpenVinoStage(HostRunner):
    """One compiled stage. `head`, if there is one, computes some inputs of `body` in fp32."""

    def __init__(self, stage: Stage, entry: GraphEntry, head: Any, body: Any) -> None:
        self.stage = stage
        self.entry = entry
        self._head = head
        self._body = body

    def __call__(self, inputs: Tensors) -> Outputs:
        inputs = complete_inputs(self.stage, self.entry.inputs, inputs)
        try:
            fed = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
            if self._head is not None:
                given = {port.any_name: fed[port.any_name] for port in self._head.inputs}
                fed |= {port.any_name: value for port, value in self._head(given).items()}
            outputs = self._body(fed)
            return {port.name: outputs[port.name] for port in self.entry.outputs}
        except Exception as error:
            raise EngineError(f"{self.stage}: openvino failed: {one_line(error, REASON_LENGTH)}") from error

    def close(self) -> None:
        self._head = self._body = None
        give_back_memory()


def _cut_at_sines(ov: Any, model: Any) -> Any:
    """Move the sines and cosines of `model`, and all operations before them, into a new model, and return that model.

    Its outputs have the names of the inputs that `model` gets in their place. Returns None for a model without sines.

    Angles of the timestep embedding reach 10000, where neighbours in bf16 are 64 apart. In 16 bits their sines would be
    noise, and so would the output of the network."""
    outputs = [op.output(0) for op in model.get_ordered_ops() if op.get_type_name() in PERIODIC]
    if not outputs:
        return None
    ops = ov.opset13
    parameters, results = [], []
    for output in outputs:
        name = f"{output.get_node().get_friendly_name()}/given"
        parameter = ops.parameter(output.get_partial_shape(), output.get_element_type(), name=name)
        parameter.output(0).set_names({name})
        for target in list(output.get_target_inputs()):
            target.replace_source_output(parameter.output(0))
        parameters.append(parameter)
        output.set_names({name})
        results.append(ops.result(output))
    needed = _parameters_above([output.get_node() for output in outputs])
    head = ov.Model(results, needed, "sines")
    model.add_parameters(parameters)
    model.validate_nodes_and_infer_types()
    return head


def _parameters_above(nodes: list[Any]) -> list[Any]:
    """The inputs of the graph from which the values of `nodes` are computed."""
    seen: dict[str, Any] = {}
    while nodes:
        node = nodes.pop()
        if node.get_name() not in seen:
            seen[node.get_name()] = node
            nodes += [value.get_node() for value in node.input_values()]
    return [node for node in seen.values() if node.get_type_name() == "Parameter"]


def require_no_bf16(stage: Stage, precision: Precision) -> None:
    """Raise EngineError for graphs that compute in bf16.

    OpenVINO 2026.4 loads them, and its results are noise, on CPUs with and without bf16 units."""
    if precision is Precision.BF16:
        raise EngineError(
            f"{stage}: its graphs compute in bf16, which OpenVINO does wrongly; export it in fp32, which the engine "
            f"openvino-bf16 computes in bf16: cascadekit export MODEL -o BUNDLE --precision {stage}=fp32"
        )


def multiplies_bf16() -> bool:
    """True if OpenVINO is installed and finds a CPU with bf16 units."""
    try:
        core = import_openvino().Core()
    except EngineError:
        return False
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def import_openvino() -> Any:
    """The module openvino, imported without sending telemetry. Raises EngineError when it is not installed.

    OpenVINO works without its telemetry package. None in sys.modules tells Python that a package is missing."""
    hidden = TELEMETRY not in sys.modules
    if hidden:
        sys.modules[TELEMETRY] = None  # type: ignore[assignment]
    try:
        import openvino
    except ImportError as error:
        reraise_interrupt(error)
        raise EngineError(f"OpenVINO is not installed: {install_hint('openvino')}") from error
    finally:
        if hidden:
            del sys.modules[TELEMETRY]
    return openvino
