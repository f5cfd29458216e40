"""The graph under construction: nodes named after PyTorch modules, weights left in the files they lie in."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ...schemas.errors import ExportError
from ...schemas.ports import Port, StagePorts
from ...schemas.tensors import Shape

OPSET = 20  # the first with Gelu; LayerNormalization and Split by parts are older
IR_VERSION = 10  # what onnxruntime 1.19 reads

STORAGE_TYPES: Mapping[str, int] = {
    "F32": TensorProto.FLOAT,
    "BF16": TensorProto.BFLOAT16,
    "F16": TensorProto.FLOAT16,
}
PORT_TYPES: Mapping[str, int] = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}


@dataclass(frozen=True)
class Weight:
    """Where the bytes of an initialiser lie; the graph refers to them as ONNX external data.

    `dtype` in safetensors' spelling (F32, BF16, F16), `location` a file name relative to the model's folder,
    `offset` and `length` in bytes, at any alignment.
    """

    dtype: str
    shape: tuple[int, ...]
    location: str
    offset: int
    length: int


class Graph:
    """An ONNX graph that grows node by node, in fp32 whatever the weights are stored in.

    A node and its value carry the path of the PyTorch module they stand for; helpers of a module are called
    ``path/part``. Images lie channels last, so a module's value is (B, h, w, c) or flattened to rows (B*h*w, c);
    only convolutions and resizes give (B, c, h, w). Values of a further pass over the same modules end in ``@1``,
    ``@2``. Initialisers have exactly the tensors' names. Values are handled by name, as strings.
    """

    def __init__(self, ports: StagePorts, expected: Mapping[str, Shape], weights: Mapping[str, Weight]) -> None:
        self._ports = ports
        self._expected = expected
        self._weights = weights
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._written: set[str] = set()  # names given to `once`
        self._problems: list[str] = []
        self._suffix = ""
        self.batch = self.once("Shape", "batch", ports.inputs[0].name, start=0, end=1)  # int64 (1,)

    # Nodes

    def node(self, op: str, name: str, *inputs: str, **attributes: Any) -> str:
        """Append a node with one output; returns the output's name, which is the node's: `name`."""
        return self._append(op, name + self._suffix, inputs, **attributes)

    def once(self, op: str, name: str, *inputs: str, **attributes: Any) -> str:
        """Like `node` for a value that passes share and several may ask for: its name stands for its content."""
        if name not in self._written:
            self._written.add(name)
            self._append(op, name, inputs, **attributes)
        return name

    def split(self, name: str, value: str, axis: int, parts: int) -> list[str]:
        """`parts` equal slices of `value` along `axis`, called ``name.0``, ``name.1`` and so on."""
        outputs = [f"{name}.{i}{self._suffix}" for i in range(parts)]
        node = helper.make_node("Split", [value], outputs, name + self._suffix, axis=axis, num_outputs=parts)
        self._nodes.append(node)
        return outputs

    @contextmanager
    def repeated(self, times: int) -> Iterator[None]:
        """Inside, modules are passed for the `times`-th time again; their names get a suffix to stay unique."""
        self._suffix = f"@{times}" if times else ""
        yield
        self._suffix = ""

    def _append(self, op: str, name: str, inputs: Sequence[str], **attributes: Any) -> str:
        self._nodes.append(helper.make_node(op, inputs, [name], name, **attributes))
        return name

    # Weights

    def weight(self, name: str, dims: Shape | None = None) -> str:
        """The tensor `name` in fp32, its bytes read as `dims` where they are given. Problems are kept for `model`."""
        stored, dtype = self.stored(name, dims)
        return stored if dtype == "F32" else self.once("Cast", f"{name}/float", stored, to=TensorProto.FLOAT)

    def stored(self, name: str, dims: Shape | None = None) -> tuple[str, str]:
        """The tensor `name` as it is stored, and its dtype in safetensors' spelling."""
        shape = self._expected[name]
        dims = shape if dims is None else dims
        assert math.prod(dims) == math.prod(shape), f"{name}: {shape} cannot be read as {dims}"
        weight = self._weights.get(name)
        if name not in self._initializers:
            problem = _problem(weight, shape)
            if problem:
                self._problems.append(f"{name}: {problem}")
            self._initializers[name] = _external(name, dims, weight)
        assert tuple(self._initializers[name].dims) == dims, f"{name}: read in two shapes"
        return name, weight.dtype if weight else "F32"

    def width(self, name: str) -> int:
        """Channels that the module `name` (Linear or convolution, not a transposed one) gives."""
        return self._expected[f"{name}.weight"][0]

    # Constants: small, inside the protobuf, one of each

    def integers(self, *values: int) -> str:
        """int64 (n,)"""
        return self.constant(f"int64[{','.join(map(str, values))}]", np.array(values, np.int64))

    def scalar(self, value: float) -> str:
        """fp32 ()"""
        return self.constant(f"float[{value!r}]", np.array(value, np.float32))

    def ones(self, width: int) -> str:
        """fp32 (width,)"""
        return self.constant(f"ones[{width}]", np.ones(width, np.float32))

    def constant(self, name: str, array: np.ndarray) -> str:
        """`array` as an initialiser called `name`; the name stands for the content."""
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(array, name)
        return name

    def shape(self, *parts: int | str) -> str:
        """int64 (n,) out of numbers and of int64 vectors; a shape for Reshape, where -1 is the open one."""
        runs: list[str] = []
        numbers: list[int] = []
        for part in (*parts, ""):
            if isinstance(part, int):
                numbers.append(part)
                continue
            if numbers:
                runs.append(self.integers(*numbers))
                numbers = []
            if part:
                runs.append(part)
        if len(runs) == 1:
            return runs[0]
        return self.once("Concat", f"shape[{','.join(map(str, parts))}]", *runs, axis=0)

    # The operations every network has

    def linear(self, name: str, rows: str, *, bias: bool = True) -> str:
        """(n, in) -> (n, out): a Linear or a 1x1 convolution, the weight used in torch's orientation as it lies."""
        inputs = [rows, self.weight(f"{name}.weight", self._expected[f"{name}.weight"][:2])]
        return self.node("Gemm", name, *inputs, *([self.weight(f"{name}.bias")] if bias else []), transB=1)

    def layer_norm(
        self, name: str, value: str, width: int, *, eps: float, scale: str | None = None, shift: str | None = None
    ) -> str:
        """Normalised over the last axis, which has `width` channels; without `scale` and `shift` affine-free."""
        inputs = [value, scale or self.ones(width), *([shift] if shift else [])]
        return self.node("LayerNormalization", name, *inputs, axis=-1, epsilon=eps)

    def silu(self, name: str, value: str) -> str:
        return self.node("Mul", name, value, self.node("Sigmoid", f"{name}/sigmoid", value))

    def rows(self, value: str, width: int) -> str:
        """(..., width) -> (n, width)"""
        return self.once("Reshape", f"{value}/rows", value, self.integers(-1, width))

    # The result

    def model(self, name: str, doc: str) -> onnx.ModelProto:
        """The finished model. Raises ExportError naming every weight that is missing or unusable."""
        if self._problems:
            problems = "\n  ".join(sorted(self._problems))
            raise ExportError(
                f"{name}: {len(self._problems)} weights cannot be used for the graph; "
                f"is the checkpoint complete and its config the right one?\n  {problems}"
            )
        graph = helper.make_graph(
            self._nodes,
            name,
            [_value_info(port) for port in self._ports.inputs],
            [_value_info(port) for port in self._ports.outputs],
            list(self._initializers.values()),
            doc,
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="cascadekit",
            doc_string=doc,
        )


def _problem(weight: Weight | None, shape: Shape) -> str | None:
    """What is wrong with `weight` where a tensor of `shape` is wanted."""
    if weight is None:
        return f"missing, expected shape {list(shape)}"
    if weight.shape != shape:
        return f"shape {list(weight.shape)}, expected {list(shape)}"
    if weight.dtype not in STORAGE_TYPES:
        return f"stored as {weight.dtype}, expected {', '.join(STORAGE_TYPES)}"
    nbytes = math.prod(shape) * (4 if weight.dtype == "F32" else 2)
    return None if weight.length == nbytes else f"{weight.length} bytes, expected {nbytes}"


def _external(name: str, dims: Shape, weight: Weight | None) -> TensorProto:
    tensor = TensorProto(name=name, dims=dims, data_location=TensorProto.EXTERNAL)
    if weight is not None:
        tensor.data_type = STORAGE_TYPES.get(weight.dtype, TensorProto.UNDEFINED)
        for key, value in (("location", weight.location), ("offset", weight.offset), ("length", weight.length)):
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def _value_info(port: Port) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(port.name, PORT_TYPES[port.dtype], port.dims)
