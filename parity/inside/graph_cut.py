"""Cuts an ONNX graph at named values, so that each part can be run on values given from outside.

Only the graph's proto is read and written. Weights stay external data, and a part names only those that it needs.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnx
from onnx import TensorProto, helper

GIVEN = "/from_reference"  # after the name of a value that is fed instead of computed
# The output types of operators whose outputs do not have the type of an input.
OUTPUT_TYPES: Mapping[str, tuple[int, ...]] = {
    "Shape": (TensorProto.INT64,),
    "ArgMax": (TensorProto.INT64,),
    "Equal": (TensorProto.BOOL,),
    "MatMulInteger": (TensorProto.INT32,),
    "DynamicQuantizeLinear": (TensorProto.UINT8, TensorProto.FLOAT, TensorProto.UINT8),
}
# The input whose type the outputs have, where it is not the first.
TYPED_BY: Mapping[str, int] = {"Where": 1, "DequantizeLinear": 1, "QuantizeLinear": 2}
QUANTIZED_OPS = ("MatMulNBits", "MatMulInteger", "DequantizeLinear")

Dims = tuple[int | None, ...]  # None: not known before the graph runs


@dataclass(frozen=True)
class GraphPart:
    """A graph that computes `outputs` from `given` values and the graph's own `inputs`.

    `reads` are the given values that each output depends on by more than their size. `quantized` are the outputs with
    a quantised product before them. `nodes` are the names of the nodes that lead from the given values to each output.
    """

    model: onnx.ModelProto
    outputs: tuple[str, ...]
    given: tuple[str, ...]
    inputs: tuple[str, ...]
    reads: Mapping[str, tuple[str, ...]]
    quantized: frozenset[str]
    nodes: Mapping[str, tuple[str, ...]]


class CutGraph:
    """An ONNX file that can be cut.

    Operations in bf16 run in fp32 and their results are rounded, because runtimes on CPUs have no bf16."""

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
        """The dims of every value whose rank is known."""
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
        """The part that computes `outputs` when all values in `cuts` that lead to them are given."""
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
            [*(port for port in self.model.graph.input if port.name in read), *(self._info(n, GIVEN) for n in given)],
            [self._info(name) for name in outputs],
            [tensor for name, tensor in self._initializers.items() if name in read],
        )
        return GraphPart(
            _like(self.model, graph),
            outputs=tuple(outputs),
            given=given,
            inputs=inputs,
            reads=reads,
            quantized=frozenset(name for name, path in paths.items() if _quantizes(path)),
            nodes={name: tuple(node.name for node in path) for name, path in paths.items()},
        )

    def given_for(self, output: str, cuts: Collection[str]) -> tuple[str, ...]:
        """The values in `cuts` that lead to `output`."""
        return tuple(self._before(output, cuts).given)

    def marked(self, outputs: Sequence[str]) -> onnx.ModelProto:
        """The whole graph with `outputs` as further outputs."""
        marked = onnx.ModelProto()
        marked.CopyFrom(self.model)
        marked.graph.output.extend(self._info(name) for name in outputs if name not in self.ports)
        return marked

    def _info(self, name: str, suffix: str = "") -> onnx.ValueInfoProto:
        """The type and rank of a value. The arrays that a part is fed decide its dims."""
        return helper.make_tensor_value_info(f"{name}{suffix}", self.types[name], [None] * len(self.dims[name]))

    def _before(self, output: str, cuts: Collection[str]) -> "_Before":
        """The nodes between given values and `output`, in the order they run."""
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
    """Nodes in the order they run, and the given values: True when they are read, False when only their size is."""

    nodes: list[onnx.NodeProto]
    given: dict[str, bool]


def _quantizes(nodes: Sequence[onnx.NodeProto]) -> bool:
    return any(node.op_type in QUANTIZED_OPS for node in nodes)


def _renamed(node: onnx.NodeProto, cuts: Collection[str]) -> onnx.NodeProto:
    if cuts and not any(name in cuts for name in node.input):
        return node
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [f"{name}{GIVEN}" if name in cuts else name for name in node.input]
    return copy


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with type and rank of every value.

    onnx cannot infer the outputs of ONNX Runtime's own operators, nor of later nodes, so these outputs are declared."""
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
    """Element types of all values. The outputs of most operators have the type of their first input."""
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
    """`model` with every bf16 value in fp32, rounded to bf16 after the operation that computes it.

    Hardware computes in the same way: it sums products of bf16 in fp32 and rounds the result."""
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
    if node.op_type == "Cast":  # a cast rounds already
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
