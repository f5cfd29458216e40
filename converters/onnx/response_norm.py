"""The GlobalResponseNorm of ConvNeXt V2 (https://arxiv.org/abs/2301.00808) and the Linear after it.

gamma * (x * n) + beta + x is written as x * (gamma * n + 1) + beta, with one factor per channel; n is the L2 norm over
the pixels, divided by its mean over the channels.
"""

from onnx import TensorProto

from ...schemas.folded_biases import folded_name
from ...schemas.precision import Target
from .graph import Graph
from .streams import NORM_EPS


def responding_linear(
    graph: Graph, names: tuple[str, str], rows: str, size: str, *, exponent: int, residual: str | None = None
) -> str:
    """The response norm ``names[0]`` and the Linear ``names[1]`` of its result, for a map of `size` (h, w).

    (B*h*w, c) gives 2^-`exponent` of (B*h*w, out). With `residual` (B*h*w, out), for ONNX Runtime alone, the product
    adds that in place of its bias, which is then `deferred_bias`."""
    norm, linear = names
    width = graph.shape_of(f"{linear}.weight")[1]
    if graph.options.target is not Target.ORT or linear in graph.options.quantized:
        rows = _in_parts(graph, norm, rows, width, exponent)
        graph.probe(rows)
        return graph.linear(linear, rows, bias_exponent=exponent)
    rows = graph.rows(_without_beta(graph, norm, _tokens(graph, norm, rows, width), size, exponent), width)
    added = residual or _bias_with_beta(graph, norm, linear, width, exponent)
    return graph.gemm(linear, rows, graph.weight(f"{linear}.weight", graph.shape_of(f"{linear}.weight")[:2]), added)


def deferred_bias(graph: Graph, block: str, exponent: int) -> str:
    """2^-`exponent` of what the perceptron of a residual block adds to each pixel beside its product: (1, out)."""
    norm, linear = f"{block}.channelwise.2", f"{block}.channelwise.4"
    return _bias_with_beta(graph, norm, linear, graph.shape_of(f"{linear}.weight")[1], exponent)


def _in_parts(graph: Graph, name: str, rows: str, width: int, exponent: int) -> str:
    """2^-exponent of the norm, (B*h*w, c) to the same, for any runtime.

    The norm over h*w is always computed in fp32. It is written in parts, because onnxruntime sums fast along a middle
    axis in ReduceSum only."""
    tokens = _tokens(graph, name, rows, width)
    inside = graph.type
    wide = graph.to_float(tokens) if inside != TensorProto.FLOAT else tokens
    with graph.island():
        squares = graph.node("Mul", f"{name}/squares", wide, wide)
        sums = graph.node("ReduceSum", f"{name}/sums", squares, graph.integers(1), keepdims=1)  # (B, 1, c)
        norm = graph.node("Sqrt", f"{name}/norm", sums)
        graph.probe(norm)
        mean = graph.node("ReduceMean", f"{name}/mean", norm, graph.integers(-1), keepdims=1)  # (B, 1, 1)
        divisor = graph.node("Add", f"{name}/divisor", mean, graph.scalar(NORM_EPS))
        response = graph.node("Div", f"{name}/response", norm, divisor)
        scaled = graph.node("Mul", f"{name}/scaled", response, graph.weight(f"{name}.gamma", (width,)))
        gain = graph.node("Add", f"{name}/gain", scaled, graph.scalar(1.0))
        if exponent:
            gain = graph.node("Mul", f"{name}/small_gain", gain, graph.scalar(2.0**-exponent))
    gain = gain if inside == TensorProto.FLOAT else graph.to_compute(gain)
    gained = graph.node("Mul", f"{name}/gained", tokens, gain)
    shift = graph.scaled_weight(f"{name}.beta", exponent, (width,))
    return graph.rows(graph.node("Add", name, gained, shift), width)


def _without_beta(graph: Graph, name: str, tokens: str, size: str, exponent: int) -> str:
    """2^-exponent of the norm without beta, (B, h*w, c) to the same, in few kernels of the compute type.

    The products that sum squares and norms add in fp32 on GPUs."""
    width = graph.shape_of(f"{name}.gamma")[-1]
    norm = graph.node(
        "Reshape", f"{name}/norms", _norms(graph, name, tokens, size), graph.integers(-1, width)
    )  # (B, c)
    # mean + epsilon, (B, 1). A power of two keeps the sum of the norms within fp16, and is exact.
    near = 2 ** (width.bit_length() - 1)
    ones = graph.full_row(width, 1 / near)
    divisor = graph.gemm(f"{name}/divisor", norm, ones, graph.full(1, NORM_EPS), alpha=near / width)
    response = graph.node("Div", f"{name}/response", norm, divisor)
    gamma = graph.scaled_weight(f"{name}.gamma", exponent, (width,))
    scaled = graph.node("Mul", f"{name}/scaled", response, gamma)
    gain = graph.node("Add", f"{name}/gain", scaled, graph.scalar(2.0**-exponent))
    gain = graph.node("Reshape", f"{name}/gains", gain, graph.integers(-1, 1, width))
    return graph.node("Mul", f"{name}/gained", tokens, gain)


def _norms(graph: Graph, name: str, tokens: str, size: str) -> str:
    """(B, h*w, c) -> (B, 1, c), the L2 norm over the pixels of a map of `size`.

    ReduceL2 squares in fp32, and CUDA has it in fp16. Elsewhere a product with ones sums the squares: CUDA sums slowly
    along the middle axis of a batch. The ones have the batch, as batched products are fast only for equal batches."""
    if graph.type == TensorProto.FLOAT16:
        return graph.node("ReduceL2", f"{name}/norm", tokens, graph.integers(1), keepdims=1)
    count = graph.once("Shape", f"{size}/pixels", tokens, start=1, end=2)
    one = graph.full(1)
    ones = graph.once("Expand", f"{size}/{one}", one, graph.shape(graph.batch, 1, count))
    squares = graph.node("Mul", f"{name}/squares", tokens, tokens)
    return graph.node("Sqrt", f"{name}/norm", graph.node("MatMul", f"{name}/sums", ones, squares))


def _bias_with_beta(graph: Graph, norm: str, linear: str, width: int, exponent: int) -> str:
    """2^-exponent of the bias plus the weight times beta: (1, out), see ``schemas.folded_biases``.

    Runtimes fold it when they load the graph, where no export has computed it."""
    out = graph.shape_of(f"{linear}.weight")[0]
    if graph.has(folded_name(linear)):
        for part in (f"{norm}.beta", f"{linear}.bias"):  # no node reads them; LoRAs that change them find them here
            graph.stored(part)
        return graph.scaled_weight(folded_name(linear), exponent, (1, out))
    inside = graph.type
    with graph.island():
        beta = graph.weight(f"{norm}.beta", (1, width))
        weight = graph.weight(f"{linear}.weight", graph.shape_of(f"{linear}.weight")[:2])
        bias = graph.once("Gemm", f"{linear}/bias", beta, weight, graph.weight(f"{linear}.bias"), transB=1)
        if exponent:
            bias = graph.once("Mul", f"{linear}/small_bias", bias, graph.scalar(2.0**-exponent))
    return bias if inside == TensorProto.FLOAT else graph.to_compute(bias)


def _tokens(graph: Graph, name: str, rows: str, width: int) -> str:
    return graph.node("Reshape", f"{name}/tokens", rows, graph.shape(graph.batch, -1, width))  # (B, h*w, c)
