"""The scan of graphs for inputs that are left out by an empty name, against onnx's own reader."""

from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cascadekit.runtime.engines.omitted_inputs import (
    ATTRIBUTE,
    FUNCTIONS,
    GRAPH,
    INPUT,
    NAME,
    NODE,
    OMITTED,
    OPERATOR,
    SUBGRAPHS,
    require_inputs_named,
    require_inputs_named_in,
)
from cascadekit.runtime.engines.onnxruntime import open_session
from cascadekit.schemas.errors import EngineError

HEAD = b"\x08\x0a"  # ir_version 10


def normed(*inputs: str) -> onnx.ModelProto:
    """LayerNormalization of x (2, 4) with a constant scale (4,)."""
    node = helper.make_node("LayerNormalization", inputs, ["y"], "norm")
    return model_of([node], [numpy_helper.from_array(np.ones(4, np.float32), "scale")])


def model_of(nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto] | None = None) -> onnx.ModelProto:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (2, 4)) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node, also of the subgraphs, as onnx reads them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from nodes_of(inner)


def refused(content: bytes) -> bool:
    try:
        require_inputs_named_in(content, "g.onnx")
    except EngineError:
        return True
    return False


def test_the_graph_that_ends_onnx_runtime_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "norm.onnx"
    onnx.save(normed("x", "scale", ""), path)
    with pytest.raises(EngineError, match=r"norm\.onnx: node 'norm' \(LayerNormalization\) leaves out input 2 by an"):
        open_session(path)
    onnx.save(normed("x", "scale"), path)
    assert open_session(path).run(None, {"x": np.ones((2, 4), np.float32)})[0].shape == (2, 4)


def test_field_numbers_are_those_of_onnx() -> None:
    def number(message: type, field: str) -> int:
        return int(message.DESCRIPTOR.fields_by_name[field].number)  # type: ignore[attr-defined]

    assert (number(onnx.ModelProto, "graph"), number(onnx.ModelProto, "functions")) == (GRAPH, FUNCTIONS)
    assert number(onnx.GraphProto, "node") == NODE
    fields = ("input", "name", "op_type", "attribute")
    assert [number(onnx.NodeProto, field) for field in fields] == [INPUT, NAME, OPERATOR, ATTRIBUTE]
    assert (number(onnx.AttributeProto, "g"), number(onnx.AttributeProto, "graphs")) == SUBGRAPHS


def test_an_empty_name_anywhere_is_found(tiny: Path) -> None:
    """Each input of each node of an exported graph, one after the other, except those that the exporter leaves out."""
    model = onnx.load(tiny / "bundle/decoder/step.onnx", load_external_data=False)
    assert not refused(model.SerializeToString())
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = ""
            allowed = place in OMITTED.get(node.op_type, ())
            assert refused(model.SerializeToString()) != allowed, (node.name, place)
            node.input[place] = name


def test_random_graphs_with_subgraphs() -> None:
    rng = Random(0)

    def graph(depth: int) -> onnx.GraphProto:
        found = onnx.GraphProto(name="g")
        for _ in range(rng.randint(1, 3)):
            kind = rng.choice([*OMITTED, "If", "Add"])
            node = found.node.add(op_type=kind, name=rng.choice(["", "n", "x" * 200]))
            node.input.extend(rng.choice(["a", "a", "a", "b" * 130, ""]) for _ in range(rng.randint(0, 5)))
            node.attribute.add(name="axis", i=rng.choice([0, -1, 2**40]), type=onnx.AttributeProto.INT)
            node.attribute.add(name="t", t=numpy_helper.from_array(np.zeros(rng.choice([0, 3, 2000]))))
            if depth:
                node.attribute.add(name="g", g=graph(depth - 1))
                node.attribute.add(name="gs", graphs=[graph(depth - 1)])
        return found

    outcomes = set()
    for _ in range(300):
        model = onnx.ModelProto(graph=graph(rng.randint(0, 2)))
        expected = any(
            name == "" and place not in OMITTED.get(node.op_type, ())
            for node in nodes_of(model.graph)
            for place, name in enumerate(node.input)
        )
        assert refused(model.SerializeToString()) == expected
        outcomes.add(expected)
    assert outcomes == {True, False}


@pytest.mark.parametrize(
    "empty",
    [b"\x0a\x00", b"\x8a\x00\x00", b"\x0a\x80\x00", b"\x0a\x80\x80\x80\x00"],
    ids=["plain", "long tag", "long length", "longer length"],
)
def test_every_encoding_of_an_empty_name(empty: bytes) -> None:
    node = b"\x0a\x01x" + empty + b"\x12\x01y\x22\x04Gemm"
    graph = b"\x0a" + bytes([len(node)]) + node
    content = HEAD + b"\x3a" + bytes([len(graph)]) + graph
    assert [*onnx.load_model_from_string(content).graph.node[0].input] == ["x", ""]
    assert refused(content)


def test_local_functions_are_refused() -> None:
    """A call may give fewer inputs than the function has; the nodes inside then leave them out."""
    function = helper.make_function("own", "F", ["a", "b"], ["c"], [], [helper.make_opsetid("", 22)])
    model = model_of([helper.make_node("F", ["x"], ["y"], domain="own")])
    model.functions.append(function)
    with pytest.raises(EngineError, match="has local functions"):
        require_inputs_named_in(model.SerializeToString(), "g.onnx")


def test_damaged_bytes_are_refused_or_taken(tmp_path: Path) -> None:
    """Every other exception would fail the test, and so would a scan without an end."""
    content, rng = normed("x", "scale").SerializeToString(), Random(0)
    for end in range(len(content)):
        refused(content[:end])
    for _ in range(3000):
        odd = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            odd[rng.randrange(len(odd))] = rng.choice((0, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        refused(bytes(odd))
    assert refused(b"\xff" * 40)
    assert refused(HEAD + b"\x3b")  # a group, which onnx has none of
    assert refused(HEAD + b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f")
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(EngineError, match=r"empty\.onnx: no ONNX graph: the file is empty"):
        require_inputs_named(tmp_path / "empty.onnx")


def test_deep_graphs_are_read() -> None:
    """Two thousand graphs inside one another: more than Python's stack has room for."""
    graph = b"\x0a\x02\x0a\x00"
    for _ in range(2000):
        for tag in (b"\x32", b"\x2a", b"\x0a"):  # attribute.g, node.attribute, graph.node
            graph = tag + _number(len(graph)) + graph
    assert refused(HEAD + b"\x3a" + _number(len(graph)) + graph)


def _number(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
