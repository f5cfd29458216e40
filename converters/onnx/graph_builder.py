"""The graph under construction: nodes named after PyTorch modules, and weights that stay in their files."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ...schemas.errors import ExportError
from ...schemas.ports import Port, StagePorts
from ...schemas.precision import Precision, Target
from ...schemas.quantization import StoredTensor
from ...schemas.tensors import Shape
from ...storage.safetensors_reader import TensorRange
from .external_weights import STORAGE_TYPES, difference_of, external_tensor, problem_of
from .graph_options import GraphOptions

IR_VERSION = 10  # read by onnxruntime 1.19, up to opset 22
ATTENTION_IR_VERSION = 11
ORT_DOMAIN = "com.microsoft"

PORT_TYPES: Mapping[str, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
}
TYPE_NAMES: Mapping[int, str] = {
    TensorProto.FLOAT: "float",
    TensorProto.FLOAT16: "half",
    TensorProto.BFLOAT16: "bfloat",
}
KEPT_FLOAT = ("timestep_ratio", "timestep_ratios")  # multiplied by 10000 in fp32 first
LOWEST: Mapping[int, float] = {  # finite, so that a sum with it stays so
    TensorProto.FLOAT: float(np.finfo(np.float32).min),
    TensorProto.FLOAT16: -65504.0,
    TensorProto.BFLOAT16: -3.3895313892515355e38,
}


class GraphBuilder:
    """An ONNX graph that grows node by node, in one precision for weights stored in any precision.

    Ports are float32, and are cast at the borders of a graph that computes in another type. `island` switches to fp32
    inside a block; `to_float` and `to_compute` cast a value on its way in and out.

    A value is handled by its name, a string. A node and its value have the path of their PyTorch module; further nodes
    of a module are called ``path/part``. Images are channels last: a module's value is (B, h, w, c), or flattened to
    rows (B*h*w, c). Only convolutions and resizes give (B, c, h, w). Values of a further pass over the same modules
    end in ``@1``, ``@2``. Initialisers have exactly the tensors' names.
    """

    def __init__(
        self,
        ports: StagePorts,
        expected: Mapping[str, Shape],
        weights: Mapping[str, TensorRange],
        options: GraphOptions = GraphOptions(),  # noqa: B008 (frozen)
    ) -> None:
        self.options = options
        self.type = PORT_TYPES[options.precision.dtype]  # of the values written now
        self._ports = ports
        self._expected = expected
        self._weights = weights
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._written: set[str] = set()  # names given to `once`
        self._problems: list[str] = []
        self._suffix = ""
        self._probes: list[str] = []
        self._inner = {} if options.precision is Precision.FP32 else _inner_names(ports, self.type)
        for port in ports.inputs:
            if port.name in self._inner:
                self._nodes.append(_cast(port.name, self._inner[port.name], self.type))
        self.batch = self.once("Shape", "batch", ports.inputs[0].name, start=0, end=1)  # int64 (1,)

    # Nodes

    def node(self, op: str, name: str, *inputs: str, **attributes: Any) -> str:
        """Append a node with one output; returns the output's name, which is the node's: `name`."""
        return self.nodes(op, [name], *inputs, **attributes)[0]

    def nodes(self, op: str, names: Sequence[str], *inputs: str, **attributes: Any) -> list[str]:
        """Append a node with the outputs `names`, called like the first. An output with an empty name is left out."""
        outputs = [name and name + self._suffix for name in names]
        self._append(op, outputs[0], inputs, outputs, **attributes)
        return outputs

    def once(self, op: str, name: str, *inputs: str, **attributes: Any) -> str:
        """Like `node`, for a value that passes and callers share: a second call with the same name adds nothing."""
        if name not in self._written:
            self._written.add(name)
            self._append(op, name, inputs, [name], **attributes)
        return name

    def split(self, name: str, value: str, axis: int, parts: int) -> list[str]:
        """`parts` equal slices of `value` along `axis`, called ``name.0``, ``name.1`` and so on."""
        return self.split_equally(name, value, axis, [f"{name}.{i}" for i in range(parts)])

    def split_equally(self, name: str, value: str, axis: int, outputs: Sequence[str]) -> list[str]:
        """Equal slices of `value` along `axis`, called `outputs`."""
        found = [output + self._suffix for output in outputs]
        self._append("Split", name + self._suffix, [value], found, axis=axis, num_outputs=len(outputs))
        return found

    def split_widths(
        self, name: str, value: str, axis: int, widths: Sequence[int], outputs: Sequence[str]
    ) -> list[str]:
        """Slices of `value` along `axis` of the given widths, called `outputs`."""
        found = [output + self._suffix for output in outputs]
        self._append("Split", name + self._suffix, [value, self.integers(*widths)], found, axis=axis)
        return found

    def quantized_rows(self, value: str) -> list[str]:
        """The fp32 `value` as uint8, its scale and its zero point; a second call adds nothing."""
        outputs = [f"{value}/{part}" for part in ("quantized", "scale", "zero_point")]
        if outputs[0] not in self._written:
            self._written.add(outputs[0])
            self._append("DynamicQuantizeLinear", outputs[0], [value], outputs)
        return outputs

    @contextmanager
    def repeated(self, times: int) -> Iterator[None]:
        """Inside the block, names get a suffix: the modules are run again, for the `times`-th time."""
        outside, self._suffix = self._suffix, f"@{times}" if times else ""
        yield
        self._suffix = outside

    def _append(self, op: str, name: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> None:
        taken, given = ([self._inner.get(value, value) for value in values] for values in (inputs, outputs))
        self._nodes.append(helper.make_node(op, taken, given, name, **attributes))

    # Precision

    @property
    def halved(self) -> bool:
        """True when values outside islands have a 16-bit type."""
        return self.options.precision is not Precision.FP32

    @contextmanager
    def island(self) -> Iterator[None]:
        """Inside the block, weights and constants are fp32; cast values with `to_float` and `to_compute`."""
        outside, self.type = self.type, TensorProto.FLOAT
        yield
        self.type = outside

    def to_float(self, value: str) -> str:
        """`value` of the compute type as fp32."""
        return self.once("Cast", f"{value}/float", value, to=TensorProto.FLOAT) if self.halved else value

    def to_compute(self, value: str) -> str:
        """An fp32 `value` in the compute type."""
        to = PORT_TYPES[self.options.precision.dtype]
        return self.once("Cast", f"{value}/{TYPE_NAMES[to]}", value, to=to) if self.halved else value

    def write_images(self, value: str) -> None:
        """Write the output `images`: `value` of the compute type, clipped to 0..1 in fp32."""
        self._inner.pop("images", None)
        with self.island():
            self.node("Clip", "images", self.to_float(value), self.scalar(0.0), self.scalar(1.0))

    def probe(self, value: str) -> None:
        """Add the output ``value/max``, the largest magnitude of the fp32 `value`, if the options ask for probes."""
        if self.options.probes and f"{value}/max" not in self._probes:
            magnitude = self.once("Abs", f"{value}/magnitude", value)
            self._probes.append(self.once("ReduceMax", f"{value}/max", magnitude, keepdims=0))

    # Weights

    def weight(self, name: str, dims: Shape | None = None) -> str:
        """The tensor `name` in the current type, its bytes read as `dims` when they are given.

        Runtimes fold the cast when they load the graph. Problems are collected, and raised by `model`."""
        stored, dtype = self.stored(name, dims)
        return self.typed(stored, dtype)

    def typed(self, stored: str, dtype: str = "F32") -> str:
        """The initialiser `stored` of `dtype` in the current type.

        A weight of a module that runs again is cast again. A runtime that folds no casts would otherwise keep it from
        its first pass to the last, as fp32: 2.2 GB of the full decoder. ONNX Runtime and OpenVINO merge equal casts
        before they fold them. Whether TensorRT does is not known, so graphs for it share one."""
        if STORAGE_TYPES.get(dtype, self.type) == self.type:
            return stored
        again = "" if self.options.target is Target.TENSORRT else self._suffix
        return self.once("Cast", f"{stored}/{TYPE_NAMES[self.type]}{again}", stored, to=self.type)

    def scaled_weight(self, name: str, exponent: int, dims: Shape | None = None) -> str:
        """The tensor `name` times 2^-exponent; the product is exact unless a value is subnormal.

        Runtimes fold it when they load the graph. ONNX Runtime folds what its CPU has kernels for: products of fp32."""
        if exponent == 0:
            return self.weight(name, dims)
        inside = self.type
        with self.island():
            weight = self.weight(name, dims)
            scaled = self.once("Mul", f"{weight}/2^{-exponent}", weight, self.scalar(2.0**-exponent))
        return scaled if inside == TensorProto.FLOAT else self.to_compute(scaled)

    def packed(self, name: str, parts: Sequence[str]) -> str | None:
        """The tensors `parts` as one called `name`, stacked along their first axis.

        Returns None when they are not adjacent in one file, or when one of them cannot be used."""
        weights = [self._weights.get(part) for part in parts]
        if any(problem_of(w, self._expected[part]) for w, part in zip(weights, parts, strict=True)):
            return None
        found = [w for w in weights if w is not None]
        ends = [(w.path, w.dtype, w.offset + w.nbytes) for w in found]
        starts = [(w.path, w.dtype, w.offset) for w in found]
        if ends[:-1] != starts[1:] or len({w.shape[1:] for w in found}) > 1:
            return None
        dims = (sum(w.shape[0] for w in found), *found[0].shape[1:])
        whole = replace(found[0], shape=dims, nbytes=sum(w.nbytes for w in found))
        self._initializers.setdefault(name, external_tensor(name, dims, whole))
        return self.typed(name, whole.dtype)

    def stored(self, name: str, dims: Shape | None = None) -> tuple[str, str]:
        """The tensor `name` in its stored dtype, and that dtype in safetensors' spelling."""
        shape = self._expected[name]
        dims = shape if dims is None else dims
        assert math.prod(dims) == math.prod(shape), f"{name}: {shape} cannot be read as {dims}"
        weight = self._weights.get(name)
        if name not in self._initializers:
            problem = problem_of(weight, shape)
            if problem:
                self._problems.append(f"{name}: {problem}")
            self._initializers[name] = external_tensor(name, dims, weight)
        assert tuple(self._initializers[name].dims) == dims, f"{name}: read in two shapes"
        return name, weight.dtype if weight else "F32"

    def stored_as(self, name: str, described: StoredTensor, data_type: int, dims: Shape) -> str:
        """The tensor `name`, stored like `described`, read as ONNX's `data_type` and `dims`."""
        weight = self._weights.get(name)
        if name not in self._initializers:
            problem = difference_of(weight, described)
            if problem:
                self._problems.append(f"{name}: {problem}")
            self._initializers[name] = external_tensor(name, dims, weight, data_type)
        return name

    def has(self, name: str) -> bool:
        """True if there is a tensor `name` to read."""
        return name in self._weights

    def is_stored_as_computed(self, name: str) -> bool:
        """True if the tensor `name` is stored in the current type, and so within its range."""
        return self.has(name) and STORAGE_TYPES.get(self._weights[name].dtype) == self.type

    def shape_of(self, name: str) -> Shape:
        """Shape of the tensor `name` before quantisation."""
        return self._expected[name]

    def width(self, name: str) -> int:
        """Output channels of the module `name`, a Linear or a convolution that is not transposed."""
        return self._expected[f"{name}.weight"][0]

    # Products

    def gemm(self, name: str, rows: str, weight: str, *bias: str, alpha: float = 1.0) -> str:
        """rows (n, in) times weight (out, in) transposed, plus the bias (out,)."""
        attributes = {"alpha": alpha} if alpha != 1 else {}
        return self.node("Gemm", name, rows, weight, *bias, transB=1, **attributes)

    # Constants: small, inside the protobuf, each written once

    def integers(self, *values: int) -> str:
        """int64 (n,)"""
        return self.constant(f"int64[{','.join(map(str, values))}]", np.array(values, np.int64))

    def scalar(self, value: float) -> str:
        """() in the current type"""
        return self._filled(f"{TYPE_NAMES[self.type]}[{value!r}]", (), value)

    def full(self, width: int, value: float = 1.0) -> str:
        """(width,) in the current type, filled with `value`"""
        return self._filled(f"{TYPE_NAMES[self.type]}[{width} x {value!r}]", (width,), value)

    def full_row(self, width: int, value: float) -> str:
        """(1, width) in the current type, filled with `value`"""
        return self._filled(f"{TYPE_NAMES[self.type]}[1 x {width} x {value!r}]", (1, width), value)

    def lowest(self) -> str:
        """() the lowest finite number of the current type"""
        return self.scalar(LOWEST[self.type])

    def _filled(self, name: str, dims: Shape, value: float) -> str:
        if name not in self._initializers:
            self._initializers[name] = helper.make_tensor(name, self.type, dims, [value] * math.prod(dims))
        return name

    def constant(self, name: str, array: np.ndarray) -> str:
        """`array` as an initialiser called `name`; a second call with the same name adds nothing."""
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(array, name)
        return name

    def shape(self, *parts: int | str) -> str:
        """int64 (n,): numbers and int64 vectors joined to a shape for Reshape, in which -1 stands for the rest."""
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

    # The result

    def model(self, name: str, doc: str) -> onnx.ModelProto:
        """The finished model. Raises ExportError naming every weight that is missing or unusable."""
        if self._problems:
            problems = "\n  ".join(sorted(self._problems))
            raise ExportError(
                f"{name}: {len(self._problems)} weights cannot be used for the graph; "
                f"is the checkpoint complete and its config the right one?\n  {problems}"
            )
        outputs = [_value_info(port) for port in self._ports.outputs]
        outputs += [helper.make_tensor_value_info(probe, TensorProto.FLOAT, ()) for probe in self._probes]
        given = (port.name for port in self._ports.outputs if port.name in self._inner)
        graph = helper.make_graph(
            _in_order(
                [*self._nodes, *(_cast(self._inner[port], port, TensorProto.FLOAT) for port in given)],
                self._initializers,
                self._probes,
            ),
            name,
            [_value_info(port) for port in self._ports.inputs],
            outputs,
            initializer=list(self._initializers.values()),
            doc_string=doc,
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid(domain, opset) for domain, opset in self._opsets()],
            ir_version=ATTENTION_IR_VERSION if self.options.target is Target.TENSORRT else IR_VERSION,
            producer_name="cascadekit",
            doc_string=doc,
        )

    def _opsets(self) -> list[tuple[str, int]]:
        domains = {node.domain for node in self._nodes}
        return [("", self.options.opset), *([(ORT_DOMAIN, 1)] if ORT_DOMAIN in domains else [])]


def _in_order(
    nodes: Iterable[onnx.NodeProto], initializers: Iterable[str], probes: Sequence[str]
) -> list[onnx.NodeProto]:
    """The same nodes: those that read weights alone first, probes last, and the earliest probe at the end.

    ONNX Runtime computes the inputs of a node from the latest to the earliest, and likewise the outputs of a graph. So
    a weight that is not folded, as in the engine onnxruntime-mapped, is cast when its product is due. A probe is
    computed as soon as its value. In another order, many casts and probed values would be in memory together."""
    constants, probed = set(initializers), set(probes)
    first: list[onnx.NodeProto] = []
    others: list[onnx.NodeProto] = []
    last: list[onnx.NodeProto] = []
    for node in nodes:
        alone = all(name in constants for name in node.input)
        (first if alone else last if node.output[0] in probed else others).append(node)
        constants.update(node.output if alone else ())
    return [*first, *others, *reversed(last)]


def _inner_names(ports: StagePorts, to: int) -> dict[str, str]:
    """Names of float ports inside a graph that computes in another type; ports in KEPT_FLOAT keep theirs."""
    floats = (port.name for port in (*ports.inputs, *ports.outputs) if port.dtype == "float32")
    return {name: f"{name}/{TYPE_NAMES[to]}" for name in floats if name not in KEPT_FLOAT}


def _cast(source: str, target: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], f"{target}/cast", to=to)


def _value_info(port: Port) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(port.name, PORT_TYPES[port.dtype], port.dims)
