"""Cuts an ONNX graph at named values, so that each part can be run on values given from outside.

Only the graph's proto is read and written: weights stay external data, and a part names those alone that it needs.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnx
from onnx import TensorProto, helper

GIVEN = "/from_reference"  # after the name of a value that is fed instead of computed
# Operators whose outputs are of other types than their first input, and the input that has their type.
OUTPUT_TYPES: Mapping[str, tuple[int, ...]] = {
    "Shape": (TensorProto.INT64,),
    "ArgMax": (TensorProto.INT64,),
    "Equal": (TensorProto.BOOL,),
    "MatMulInteger": (TensorProto.INT32,),
    "DynamicQuantizeLinear": (TensorProto.UINT8, TensorProto.FLOAT, TensorProto.UINT8),
}
TYPED_BY: Mapping[str, int] = {"Where": 1, "DequantizeLinear": 1, "QuantizeLinear": 2}
QUANTIZED_OPS = ("MatMulNBits", "MatMulInteger", "DequantizeLinear")

Dims = tuple[int | None, ...]  # None: not known before it runs


@dataclass(frozen=True)
class GraphPart:
    """A graph that computes `outputs` from `given` values and the graph's own `inputs`.

    `reads` are the given values that each output depends on other than by their size, `quantized` the outputs with a
    quantised product before them, `nodes` those that lead from the given values to each output."""

    model: onnx.ModelProto
    outputs: tuple[str, ...]
    given: tuple[str, ...]
    inputs: tuple[str, ...]
    reads: Mapping[str, tuple[str, ...]]
    quantized: frozenset[str]
    nodes: Mapping[str, tuple[str, ...]]


class CutGraph:
    """An ONNX file to be cut; values that compute in bf16 do so in fp32 and are rounded after every operation, as
    runtimes on CPUs have no bf16."""

    def __init__(self, path: Path) -> None:
        model = onnx.load(path, load_external_data=False)
        types = _types(model)
        self.rounded = TensorProto.BFLOAT16 in types.values()
        if self.rounded:
            model = _rounding(model, types)
        self.model = model
        self.ports = [port.name for port in model.graph.output]
        self._inferred = _inferred(model)
        self._producers = {output: node for node in model.graph.node for output in node.output}
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}

    @cached_property
    def dims(self) -> dict[str, Dims]:
        """Of every value whose rank is known."""
        values = (*self._inferred.graph.value_info, *self._inferred.graph.output)
        return {
            value.name: tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in shape.dim)
            for value in values
            if (shape := value.type.tensor_type.shape) is not None
        }

    @cached_property
    def types(self) -> dict[str, int]:
        """Element types of all values."""
        return _types(self._inferred)

    @cached_property
    def order(self) -> dict[str, int]:
        """The place of every value among those computed."""
        return {output: place for place, node in enumerate(self.model.graph.node) for output in node.output}

    def part(self, outputs: Sequence[str], cuts: Collection[str]) -> GraphPart:
        """What computes `outputs` when all values in `cuts` that lead to them are given."""
        needed: dict[int, onnx.NodeProto] = {}
        reads, paths = {}, {}
        sought: set[str] = set()
        for output in outputs:
            found = self._before(output, cuts)
            needed |= {self.order[node.output[0]]: node for node in found.nodes}
            reads[output], paths[output] = tuple(name for name, value in found.given.items() if value), found.nodes
            sought |= found.given.keys()
        nodes = [_renamed(node, cuts) for _, node in sorted(needed.items())]
        read = {name for node in nodes for name in node.input}
        given = tuple(sorted(sought))
        inputs = tuple(port.name for port in self.model.graph.input if port.name in read)
        graph = helper.make_graph(
            nodes,
            "part",
            [
                *(port for port in self.model.graph.input if port.name in read),
                *(
                    helper.make_tensor_value_info(f"{name}{GIVEN}", self.types[name], self._open(name))
                    for name in given
                ),
            ],
            [helper.make_tensor_value_info(name, self.types[name], self._open(name)) for name in outputs],
            [tensor for name, tensor in self._initializers.items() if name in read],
        )
        return GraphPart(
            _like(self.model, graph),
            tuple(outputs),
            given,
            inputs,
            reads,
            frozenset(name for name, path in paths.items() if any(node.op_type in QUANTIZED_OPS for node in path)),
            {name: tuple(node.name for node in path) for name, path in paths.items()},
        )

    def given_for(self, output: str, cuts: Collection[str]) -> tuple[str, ...]:
        """The values in `cuts` that lead to `output`."""
        return tuple(self._before(output, cuts).given)

    def marked(self, outputs: Sequence[str]) -> onnx.ModelProto:
        """The whole graph, with `outputs` given out beside its own."""
        marked = onnx.ModelProto()
        marked.CopyFrom(self.model)
        marked.graph.output.extend(
            helper.make_tensor_value_info(name, self.types[name], self._open(name))
            for name in outputs
            if name not in self.ports
        )
        return marked

    def _open(self, name: str) -> list[str | None]:
        """As many unknown dims as the value has: what a part is fed decides."""
        return [None] * len(self.dims[name])

    def _before(self, output: str, cuts: Collection[str]) -> "_Before":
        """What leads to `output` from given values on, in the order that it runs."""
        nodes: dict[int, onnx.NodeProto] = {}
        given: dict[str, bool] = {}
        waiting = [output]
        while waiting:
            node = self._producers[waiting.pop()]
            place = self.order[node.output[0]]
            if place in nodes:
                continue
            nodes[place] = node
            for name in node.input:
                if name in cuts:
                    given[name] = given.get(name, False) or node.op_type != "Shape"
                elif name in self._producers:
                    waiting.append(name)
        return _Before([node for _, node in sorted(nodes.items())], given)


@dataclass(frozen=True)
class _Before:
    """Nodes in the order they run, and the given values: whether they are read, or only their size is."""

    nodes: list[onnx.NodeProto]
    given: dict[str, bool]


def _renamed(node: onnx.NodeProto, cuts: Collection[str]) -> onnx.NodeProto:
    if cuts and not any(name in cuts for name in node.input):
        return node
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [f"{name}{GIVEN}" if name in cuts else name for name in node.input]
    return copy


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with type and rank of every value. onnx knows nothing of ONNX Runtime's own operators, and of nothing
    after them, so theirs are told."""
    foreign = [node for node in model.graph.node if node.domain]
    if not foreign:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    types = _followed(model)
    told = onnx.ModelProto()
    told.CopyFrom(model)
    for node in foreign:
        widths = [attribute.i for attribute in node.attribute if attribute.name == "N"]
        dims: list[int | None] = [None, *widths] if widths else [None, None, None]
        told.graph.value_info.append(helper.make_tensor_value_info(node.output[0], types[node.output[0]], dims))
    return onnx.shape_inference.infer_shapes(told, data_prop=True)


def _followed(model: onnx.ModelProto) -> dict[str, int]:
    """Element types of all values: of most operators' outputs that of their first input."""
    graph = model.graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        casts = [attribute.i for attribute in node.attribute if attribute.name == "to"]
        typed = OUTPUT_TYPES.get(node.op_type)
        source = node.input[TYPED_BY.get(node.op_type, 0)]
        for place, output in enumerate(node.output):
            types[output] = casts[0] if casts else typed[place] if typed else types[source]
    return types


def _types(model: onnx.ModelProto) -> dict[str, int]:
    graph = (model if model.graph.value_info else _inferred(model)).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def _rounding(model: onnx.ModelProto, types: Mapping[str, int]) -> onnx.ModelProto:
    """`model` with every bf16 value in fp32, rounded to bf16 by the operation that makes it.

    That is what hardware does: products of bf16 summed in fp32, the result rounded."""
    nodes: list[onnx.NodeProto] = []
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            nodes.append(_cast(tensor.name, f"{tensor.name}/wide", TensorProto.FLOAT))
    stored = {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.BFLOAT16}
    for node in model.graph.node:
        nodes += _rounded(node, types, stored)
    graph = helper.make_graph(
        nodes, model.graph.name, model.graph.input, model.graph.output, list(model.graph.initializer)
    )
    return _like(model, graph)


def _rounded(node: onnx.NodeProto, types: Mapping[str, int], stored: Collection[str]) -> Iterator[onnx.NodeProto]:
    halves = [name for name in node.output if types.get(name) == TensorProto.BFLOAT16]
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [f"{name}/wide" if name in stored else name for name in node.input]
    if not halves:
        yield copy
        return
    if node.op_type == "Cast":  # its own rounding is enough
        copy.output[:] = [f"{name}/half" for name in node.output]
        yield copy
    else:
        copy.output[:] = [f"{name}/exact" if name in halves else name for name in node.output]
        yield copy
        for name in halves:
            yield _cast(f"{name}/exact", f"{name}/half", TensorProto.BFLOAT16)
    for name in halves:
        yield _cast(f"{name}/half", name, TensorProto.FLOAT)


def _cast(source: str, target: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], f"{target}/rounding", to=to)


def _like(model: onnx.ModelProto, graph: onnx.GraphProto) -> onnx.ModelProto:
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
