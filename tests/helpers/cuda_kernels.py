"""The types for which ONNX Runtime's CUDA provider has kernels, and the nodes of a graph that have none.

The table is docs/OperatorKernels.md of ONNX Runtime (2026-10), for the operators of the graphs. Where the documentation
of one version and the binary of another differ, the table has what both have.
"""

from collections.abc import Iterator, Mapping

import onnx
from onnx import TensorProto, helper, shape_inference

T = TensorProto
F32, F16, BF16 = T.FLOAT, T.FLOAT16, T.BFLOAT16
INTEGERS, WORDS = (T.INT32, T.INT64), (T.INT32, T.INT64, T.BOOL)
ORT = "com.microsoft"

Since = Mapping[int, int]  # the first opset of a kernel by type


def _since(opset: int, *types: int, later: Since | None = None) -> Since:
    return {**dict.fromkeys(types, opset), **(later or {})}


EVERY = _since(1, F32, F16, BF16, *WORDS)  # operators that move bytes
FLOATS = _since(13, F32, F16, BF16)
WIDE = _since(1, F32, F16)  # without bf16

# By domain and operator: the input whose type counts, and the kernels.
KERNELS: Mapping[tuple[str, str], tuple[int, Since]] = {
    **{("", op): (0, EVERY) for op in ("Cast", "Concat", "Expand", "Gather", "Identity", "Reshape", "Shape", "Slice")},
    **{("", op): (0, EVERY) for op in ("Split", "Squeeze", "Transpose", "Unsqueeze")},
    **{("", op): (0, {**FLOATS, **_since(7, *INTEGERS)}) for op in ("Add", "Div", "Mul", "Sub", "Max")},
    **{("", op): (0, FLOATS) for op in ("Abs", "Gemm", "MatMul", "Sigmoid", "Softmax", "Sqrt")},
    **{("", op): (0, WIDE) for op in ("BatchNormalization", "ConvTranspose", "DepthToSpace", "GlobalAveragePool")},
    **{("", op): (0, WIDE) for op in ("Clip", "Cos", "LeakyRelu", "Pad", "Resize", "Sin")},
    ("", "And"): (0, _since(7, T.BOOL)),
    ("", "ArgMax"): (0, WIDE),
    ("", "AveragePool"): (0, {**WIDE, BF16: 22}),
    ("", "Conv"): (0, {**WIDE, BF16: 22}),
    ("", "Equal"): (0, _since(11, F32, F16, *WORDS)),
    ("", "GatherND"): (0, _since(13, F32, F16, BF16, T.INT64, T.BOOL)),
    ("", "Gelu"): (0, _since(20, F32, F16, BF16)),
    ("", "LayerNormalization"): (0, _since(17, F32, F16, BF16)),
    ("", "ReduceL2"): (0, WIDE),
    ("", "ReduceMax"): (0, {**WIDE, **_since(1, *INTEGERS)}),
    ("", "ReduceMean"): (0, {**WIDE, T.INT32: 1}),
    ("", "ReduceSum"): (0, {**FLOATS, **_since(13, *INTEGERS)}),
    ("", "Where"): (1, {**_since(9, F32, F16, *INTEGERS), BF16: 16}),
    **{(ORT, op): (0, _since(1, F32, F16, BF16)) for op in ("BiasGelu", "FusedMatMul", "MultiHeadAttention")},
    (ORT, "SkipLayerNormalization"): (0, _since(1, F32, F16, BF16)),
}


def without_kernel(model: onnx.ModelProto) -> Iterator[str]:
    """Yield "operator type (name)" for each node that CUDA has no kernel for; an unknown operator is one of them.

    Nodes of constants alone are left out, because ONNX Runtime computes these on the CPU when it loads the graph."""
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    types = types_of(model)
    known = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if all(name in known for name in node.input if name):
            known.update(node.output)
            continue
        position, since = KERNELS.get((node.domain, node.op_type), (0, {}))
        kind = types[node.input[position]]
        if since.get(kind, 1000) > opsets[node.domain]:
            yield f"{node.op_type} {T.DataType.Name(kind)} ({node.name})"


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every value, as onnx infers it.

    onnx infers nothing of com.microsoft's operators. Their outputs are declared to it with the type of their first
    input, in a copy of the graph."""
    followed = _followed(model)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in model.graph.node:
        if node.domain == ORT:
            made = (helper.make_tensor_value_info(name, followed[node.input[0]], None) for name in node.output if name)
            copy.graph.value_info.extend(made)
    inferred = shape_inference.infer_shapes(copy).graph
    found = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for value in (*inferred.value_info, *inferred.input, *inferred.output):
        found[value.name] = value.type.tensor_type.elem_type
    return found


def _followed(model: onnx.ModelProto) -> dict[str, int]:
    """Element types of all values; the outputs of most operators have the type of their first input."""
    found = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    found |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    fixed = {"Shape": T.INT64, "ArgMax": T.INT64, "Equal": T.BOOL, "And": T.BOOL}
    for node in model.graph.node:
        kind = found[node.input[1 if node.op_type == "Where" else 0]]
        for attribute in node.attribute:
            kind = attribute.i if (node.op_type, attribute.name) == ("Cast", "to") else kind
        found |= dict.fromkeys(node.output, fixed.get(node.op_type, kind))
    return found
