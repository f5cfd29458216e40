"""Products with quantised weights, in the operators that each target has.

| weights | operators |
|---|---|
| int8, int4 for ONNX Runtime | MatMulNBits of com.microsoft, which reads weights of 4 and 8 bits as they are stored |
| int8-dynamic | DynamicQuantizeLinear and MatMulInteger, standard operators that ONNX Runtime joins into one |
| others | DequantizeLinear before the Gemm; TensorRT joins them, other runtimes only save disk space |
"""

from collections.abc import Callable, Mapping

from onnx import TensorProto

from ...schemas.quantization import Quantization, quantized_name, scale_name, stored_tensors
from ...schemas.tensors import Shape
from .graph_builder import ORT_DOMAIN, GraphBuilder

INT8_LEVEL = 4  # MatMulNBits' accuracy_level for products of 8-bit integers

# The types that DequantizeLinear reads. A byte of the file holds two 4-bit values, so dims are not those of the file.
VALUE_TYPES: Mapping[Quantization, int] = {
    Quantization.INT8: TensorProto.INT8,
    Quantization.INT4: TensorProto.INT4,
    Quantization.FP8: TensorProto.FLOAT8E4M3FN,
}


def quantized_linear(graph: GraphBuilder, name: str, rows: str, *bias: str, factor: float = 1.0) -> str:
    """rows (n, in) times the weight (out, in) of the module `name` transposed, plus the bias (out,).

    `factor`, a power of two, multiplies the scales. It changes no bit of their mantissas."""
    scheme = graph.options.scheme
    write = _packed if scheme.packed else PRODUCTS[scheme.kind]
    return write(graph, name, rows, bias, factor)


def _packed(graph: GraphBuilder, name: str, rows: str, bias: tuple[str, ...], factor: float) -> str:
    scheme, (out, width) = graph.options.scheme, graph.shape_of(f"{name}.weight")[:2]
    values, scale = _stored(graph, name, TensorProto.UINT8)
    return graph.node(
        "MatMulNBits",
        name,
        rows,
        values,
        _times(graph, graph.typed(scale), factor),
        *(["", "", *bias] if bias else []),  # without zero points (the middle is 0) and without an order of columns
        K=width,
        N=out,
        bits=scheme.bits,
        block_size=scheme.block_size,
        accuracy_level=INT8_LEVEL if scheme.int8_products else 0,
        domain=ORT_DOMAIN,
    )


def _dequantized(graph: GraphBuilder, name: str, rows: str, bias: tuple[str, ...], factor: float) -> str:
    scheme = graph.options.scheme
    values, scale = _stored(graph, name, VALUE_TYPES[scheme.kind], graph.shape_of(f"{name}.weight")[:2])
    scale = _times(graph, graph.typed(scale), factor)
    layout = {"axis": 1, "block_size": scheme.block_size} if scheme.blockwise else {"axis": 0}
    weight = graph.once("DequantizeLinear", f"{scale}/dequantized", values, scale, **layout)
    return graph.gemm(name, rows, weight, *bias)


def _integer(graph: GraphBuilder, name: str, rows: str, bias: tuple[str, ...], factor: float) -> str:
    """A product of integers; its inputs and its result are fp32, because DynamicQuantizeLinear takes only fp32."""
    narrow = graph.type != TensorProto.FLOAT
    values, scale = _stored(graph, name, TensorProto.INT8)
    quantized, step, zero_point = graph.quantized_rows(graph.to_float(rows) if narrow else rows)
    counted = graph.node("MatMulInteger", f"{name}/integers", quantized, values, zero_point)
    wide = graph.node("Cast", f"{name}/counted", counted, to=TensorProto.FLOAT)
    with graph.island():
        scale = _times(graph, scale, factor)
    both = graph.node("Mul", f"{name}/scale", step, scale)
    product = graph.node("Mul", f"{name}/product" if narrow or bias else name, wide, both)
    if narrow:
        product = graph.node("Cast", f"{name}/narrow" if bias else name, product, to=graph.type)
    return graph.node("Add", name, product, *bias) if bias else product


PRODUCTS: Mapping[Quantization, Callable[[GraphBuilder, str, str, tuple[str, ...], float], str]] = {
    Quantization.INT8: _dequantized,
    Quantization.INT4: _dequantized,
    Quantization.FP8: _dequantized,
    Quantization.INT8_DYNAMIC: _integer,
}


def _stored(graph: GraphBuilder, name: str, data_type: int, dims: Shape | None = None) -> tuple[str, str]:
    """The initialisers of values and scales; the values are read as `dims` when the file packs them."""
    rows, columns = graph.shape_of(f"{name}.weight")[:2]
    described = stored_tensors(graph.options.scheme, name, rows, columns)
    values, scale = described[quantized_name(name)], described[scale_name(name)]
    return (
        graph.stored_as(quantized_name(name), values, data_type, dims or values.shape),
        graph.stored_as(scale_name(name), scale, TensorProto.FLOAT, scale.shape),
    )


def _times(graph: GraphBuilder, scale: str, factor: float) -> str:
    return scale if factor == 1 else graph.once("Mul", f"{scale}*{factor!r}", scale, graph.scalar(factor))
