"""Faults planted in a bundle: in its weights' bytes, or in a graph, as an exporter's mistake would be."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper
from safetensors.numpy import load_file

from helpers.standins import accept_changes

Plant = Callable[[Path, str], None]  # into the stage's folder, at a node or tensor


def planted(bundle: Path, stage: str, target: Path, plant: Plant, place: str) -> Path:
    """A bundle of the one stage with the fault in it."""
    shutil.rmtree(target, ignore_errors=True)
    (target / stage).mkdir(parents=True)
    for file in (bundle / stage).iterdir():
        shutil.copyfile(file, target / stage / file.name)
    manifest = json.loads((bundle / "cascade.json").read_text())
    manifest["stages"] = {stage: manifest["stages"][stage]}
    manifest["tokenizer"] = None  # the package's own is the same
    (target / "cascade.json").write_text(json.dumps(manifest))
    plant(target / stage, place)
    accept_changes(target)
    return target


def _in_weights(
    folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray], file: str = "weights.safetensors"
) -> None:
    path = folder / file
    data, content = load_file(path), bytearray(path.read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    start = 8 + int.from_bytes(content[:8], "little") + header[name]["data_offsets"][0]
    changed = np.ascontiguousarray(change(data[name].copy()), data[name].dtype)
    assert changed.tobytes() != data[name].tobytes()
    content[start : start + changed.nbytes] = changed.tobytes()
    path.write_bytes(content)


def _in_graph(folder: Path, change: Callable[[onnx.GraphProto], None]) -> None:
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model.graph)
    onnx.save(model, path)


def _node(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    return next(node for node in graph.node if node.name == name)


def one_weight(folder: Path, name: str) -> None:
    """One number of thousands is off by a standard deviation."""

    def change(values: np.ndarray) -> np.ndarray:
        values.flat[values.size // 3] += values.std()
        return values

    _in_weights(folder, name, change)


def one_scale(folder: Path, module: str) -> None:
    """The step of one block of one row is twice what it was."""

    def change(values: np.ndarray) -> np.ndarray:
        values.flat[values.size // 3] *= 2
        return values

    _in_weights(folder, f"{module}.weight_scale", change, "quantized.safetensors")


def transposed(folder: Path, name: str) -> None:
    _in_weights(folder, name, lambda values: values.reshape(len(values), -1).T)


def swapped(folder: Path, names: str) -> None:
    """Two tensors of one shape, each in the other's place."""
    first, second = names.split()
    data = load_file(folder / "weights.safetensors")
    _in_weights(folder, first, lambda values: data[second])
    _in_weights(folder, second, lambda values: data[first])


def no_bias(folder: Path, name: str) -> None:
    def change(graph: onnx.GraphProto) -> None:
        node = _node(graph, name)
        assert len(node.input) == 3, node.op_type
        del node.input[2]

    _in_graph(folder, change)


def epsilon(folder: Path, name: str) -> None:
    """PyTorch's usual one instead of the network's, or the other way round."""

    def change(graph: onnx.GraphProto) -> None:
        attribute = next(a for a in _node(graph, name).attribute if a.name == "epsilon")
        attribute.f = 1e-5 if attribute.f < 5e-6 else 1e-3

    _in_graph(folder, change)


def tanh_gelu(folder: Path, name: str) -> None:
    def change(graph: onnx.GraphProto) -> None:
        node = _node(graph, name)
        assert node.op_type == "Gelu"
        node.attribute.append(helper.make_attribute("approximate", "tanh"))

    _in_graph(folder, change)


def half_island(folder: Path, name: str) -> None:
    """A value of an fp32 graph goes through fp16."""

    def change(graph: onnx.GraphProto) -> None:
        place = next(i for i, node in enumerate(graph.node) if name in node.output)
        node = graph.node[place]
        node.output[list(node.output).index(name)] = f"{name}/wide"
        casts = [
            helper.make_node(
                "Cast", [f"{name}/wide"], [f"{name}/half"], f"{name}/narrowed", to=onnx.TensorProto.FLOAT16
            ),
            helper.make_node("Cast", [f"{name}/half"], [name], f"{name}/widened", to=onnx.TensorProto.FLOAT),
        ]
        nodes = [*graph.node[: place + 1], *casts, *graph.node[place + 1 :]]
        del graph.node[:]
        graph.node.extend(nodes)

    _in_graph(folder, change)


def attribute(folder: Path, place: str) -> None:
    """``NODE attribute=value``: how a Resize maps coordinates, a Pad fills edges, or other words."""
    name, assignment = place.split()
    key, value = assignment.split("=")

    def change(graph: onnx.GraphProto) -> None:
        found = next(a for a in _node(graph, name).attribute if a.name == key)
        old = helper.get_attribute_value(found)
        found.CopyFrom(helper.make_attribute(key, type(old)(value) if not isinstance(old, bytes) else value))

    _in_graph(folder, change)
