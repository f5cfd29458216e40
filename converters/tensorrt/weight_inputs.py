"""Weights that become inputs of a graph: those of matrix products, which are what LoRAs change."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Literal

import onnx

from ...runtime.engines.tensorrt.plan_weights import sha256_of_ranges
from ...schemas.bundle import BuiltIn, WeightInput

PRODUCTS = ("Gemm", "MatMul")
WEIGHT = 1  # position of the weights among their inputs
TAKEN: Mapping[int, Literal["F32", "F16", "BF16"]] = {
    onnx.TensorProto.FLOAT: "F32",
    onnx.TensorProto.FLOAT16: "F16",
    onnx.TensorProto.BFLOAT16: "BF16",
}


def weight_inputs(model: onnx.ModelProto, graph: Path, root: Path) -> tuple[WeightInput, ...]:
    """The weights of products in `graph`, a file of the bundle at `root`, that lie in a file of weights as they are."""
    names = _of_products(model)
    return tuple(
        WeightInput(
            name=tensor.name,
            path=path,
            offset=start,
            bytes=stop - start,
            dtype=TAKEN[tensor.data_type],
            shape=tuple(tensor.dims),
        )
        for tensor, path, start, stop in _placed(model, graph, root)
        if tensor.name in names and tensor.data_type in TAKEN
    )


def built_in(model: onnx.ModelProto, graph: Path, root: Path, inputs: Collection[WeightInput]) -> BuiltIn:
    """The byte ranges of the inputs' files that are compiled into a plan with `inputs`, with their SHA-256."""
    names, paths = {weight.name for weight in inputs}, {weight.path for weight in inputs}
    ranges: dict[str, list[tuple[int, int]]] = {path: [] for path in sorted(paths)}
    for tensor, path, start, stop in _placed(model, graph, root):
        if path in paths and tensor.name not in names:
            ranges[path].append((start, stop))
    merged = {path: tuple(_merged(sorted(parts))) for path, parts in ranges.items()}
    return BuiltIn(ranges=merged, sha256=sha256_of_ranges(root, merged))


def with_weight_inputs(model: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """`model`, which is changed: the initialisers of these names are inputs of it."""
    graph = model.graph
    moved = [tensor for tensor in graph.initializer if tensor.name in names]
    there = {value.name for value in graph.input}
    kept = [tensor for tensor in graph.initializer if tensor.name not in names]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    graph.input.extend(
        onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        for tensor in moved
        if tensor.name not in there
    )
    return model


def _of_products(model: onnx.ModelProto) -> set[str]:
    """Names of initialisers that nothing but products takes, as their weights."""
    weights: set[str] = set()
    others = {value.name for value in model.graph.output}
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            (weights if node.op_type in PRODUCTS and position == WEIGHT else others).add(name)
    return weights - others


def _placed(model: onnx.ModelProto, graph: Path, root: Path) -> Iterator[tuple[onnx.TensorProto, str, int, int]]:
    """Initialisers in other files: the file, and where in it they begin and end."""
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            said = {entry.key: entry.value for entry in tensor.external_data}
            path = (graph.parent / said["location"]).relative_to(root).as_posix()
            start = int(said.get("offset", 0))
            stop = start + int(said["length"]) if "length" in said else (root / path).stat().st_size
            yield tensor, path, start, stop


def _merged(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Merge ranges that touch or overlap."""
    pending: tuple[int, int] | None = None
    for start, stop in ranges:
        if pending and start <= pending[1]:
            pending = pending[0], max(pending[1], stop)
            continue
        if pending:
            yield pending
        pending = start, stop
    if pending:
        yield pending
