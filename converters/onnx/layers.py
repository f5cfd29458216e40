"""Layers of several networks: feature maps in either memory layout, convolutions on them, and attention."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...schemas.precision import Precision, Target
from ...schemas.tensors import Shape
from .graph import Graph
from .graph_builder import ORT_DOMAIN
from .streams import NORM_EPS

LAST = 2**63 - 1  # the end of an axis, in Slice


class Image:
    """A feature map in one memory layout; the Transpose to the other layout is written at its first use.

    Convolutions take channels first, everything else channels last. Thus two convolutions in a row have no Transpose
    between them, and a map with several users is transposed once.
    """

    def __init__(
        self, graph: Graph, channels: int, *, first: str | None = None, last: str | None = None, size: str | None = None
    ) -> None:
        self.graph = graph
        self.channels = channels
        self._first = first
        self._last = last
        self._size = size
        self.norm: Image | None = None  # the affine-free LayerNorm of this image, if an operator gave both

    @property
    def first(self) -> str:
        """(B, c, h, w)"""
        if self._first is None:
            self._first = self.graph.once("Transpose", f"{self._last}/first", self.last, perm=[0, 3, 1, 2])
        return self._first

    @property
    def last(self) -> str:
        """(B, h, w, c)"""
        if self._last is None:
            self._last = self.graph.once("Transpose", f"{self._first}/last", self.first, perm=[0, 2, 3, 1])
        return self._last

    @property
    def rows(self) -> str:
        """(B*h*w, c)"""
        return self.graph.rows(self.last, self.channels)

    @property
    def size(self) -> str:
        """int64 (2,): h and w. Images of one size by construction share this value."""
        if self._size is None:
            self._size = self.graph.once("Shape", f"{self.first}/size", self.first, start=2)
        return self._size

    def has_size(self, size: str) -> bool:
        """True when this image has `size` for all inputs of the graph."""
        return self._size == size

    def with_norm(self, norm: "Image") -> "Image":
        """The same image, with its norm known."""
        made = Image(self.graph, self.channels, first=self._first, last=self._last, size=self._size)
        made.norm = norm
        return made

    def with_last(self, value: str, channels: int | None = None) -> "Image":
        """Another image of this size: `value` is (B, h, w, channels)."""
        return Image(self.graph, channels or self.channels, last=value, size=self.size)

    def with_rows(self, value: str, channels: int | None = None) -> "Image":
        """Another image of this size: `value` is (B*h*w, channels)."""
        channels = channels or self.channels
        shape = self.graph.shape(self.graph.batch, self.size, channels)
        return self.with_last(self.graph.once("Reshape", f"{value}/last", value, shape), channels)


def pointwise(
    graph: Graph, name: str, image: Image, *, bias: bool = True, bias_exponent: int = 0, **factors: Any
) -> Image:
    """The 1x1 convolution `name`, as the matrix product it is; `factors` are `alpha` and `exponent` of a Linear."""
    rows = graph.linear(name, image.rows, bias=bias, bias_exponent=bias_exponent, **factors)
    return image.with_rows(rows, graph.width(name))


def convolution(
    graph: Graph,
    name: str,
    value: str,
    channels: int,
    *,
    weights: str | None = None,
    dims: Shape | None = None,
    size: str | None = None,
    bias: bool = True,
    exponent: int = 0,
    bias_exponent: int = 0,
    **attributes: Any,
) -> Image:
    """The convolution `name` of `value` (B, c, h, w); its weight is read as `dims` when they are given.

    The result has `channels`, and `size` when it is known. The weight is multiplied by 2^-`exponent`, the bias by
    2^-`bias_exponent`. `weights` is the module whose weights are used, if `name` is none."""
    module = weights or name
    inputs = [value, graph.scaled_weight(f"{module}.weight", exponent, dims)]
    if bias:
        inputs.append(graph.scaled_weight(f"{module}.bias", bias_exponent))
    return Image(graph, channels, first=graph.node("Conv", name, *inputs, **attributes), size=size)


def transposed_convolution(
    graph: Graph, name: str, image: Image, channels: int, *, bias_exponent: int = 0, **attributes: Any
) -> Image:
    """The ConvTranspose2d `name`, to `channels`; the bias is multiplied by 2^-`bias_exponent`.

    A graph in bf16 computes it in fp32, because TensorRT has no such kernel in bf16."""
    if graph.options.precision is Precision.BF16:
        with graph.island():
            weight, bias = graph.weight(f"{name}.weight"), graph.scaled_weight(f"{name}.bias", bias_exponent)
            made = graph.node("ConvTranspose", f"{name}/wide", graph.to_float(image.first), weight, bias, **attributes)
        return Image(graph, channels, first=graph.node("Cast", name, made, to=graph.type))
    weight, bias = graph.weight(f"{name}.weight"), graph.scaled_weight(f"{name}.bias", bias_exponent)
    return Image(graph, channels, first=graph.node("ConvTranspose", name, image.first, weight, bias, **attributes))


def normalised(graph: Graph, name: str, image: Image, *, exponent: int = 0, out: int = 0) -> Image:
    """Affine-free LayerNorm over the channels. The image holds 2^-`exponent` of its values, so epsilon is multiplied by
    4^-`exponent`. The result is 2^-`out` of the norm."""
    scale, eps = graph.full(image.channels, 2.0**-out), NORM_EPS * 4.0**-exponent
    return image.with_last(graph.layer_norm(name, image.last, image.channels, eps=eps, scale=scale))


def normalised_convolution(
    graph: Graph, names: tuple[str, str], image: Image, *, exponent: int, out: int, **attributes: Any
) -> Image:
    """The convolution ``names[0]`` that keeps size and channels, and the affine-free LayerNorm ``names[1]`` after it.

    The image holds 2^-`exponent` of its values, the result 2^-`out`. ONNX Runtime adds the bias in the norm."""
    name, norm = names
    fused = graph.options.target is Target.ORT
    made = convolution(
        graph,
        f"{name}/product" if fused else name,
        image.first,
        image.channels,
        weights=name,
        size=image.size,
        bias=not fused,
        bias_exponent=exponent,
        **attributes,
    )
    if not fused:
        return normalised(graph, norm, made, exponent=exponent, out=out)
    bias = graph.scaled_weight(f"{name}.bias", exponent, (1, 1, made.channels))
    return normalised_sum(graph, (norm, ""), made, bias, exponent=exponent, out=out)[0]


def normalised_sum(
    graph: Graph, names: tuple[str, str], image: Image, summand: str, *, exponent: int, out: int = 0
) -> tuple[Image, Image]:
    """The norm ``names[0]`` of the sum ``names[1]`` of an image and one pixel, `summand` (1, 1, c), and that sum.

    It is one operator of ONNX Runtime. Exponents are those of `normalised`. The sum is left out if it has no name."""
    # Each pixel is a batch of its own: what is added may be broadcast along the batch only.
    norm, total = names
    pixels = graph.node("Reshape", f"{norm}/pixels", image.last, graph.integers(-1, 1, image.channels))
    operands = (pixels, summand, graph.full(image.channels, 2.0**-out))
    eps = {"epsilon": NORM_EPS * 4.0**-exponent, "domain": ORT_DOMAIN}
    outputs = [norm, "", "", f"{total}/pixels"] if total else [norm]
    made = graph.nodes("SkipLayerNormalization", outputs, *operands, **eps)
    normed = image.with_rows(made[0])
    return normed, image.with_rows(made[-1]) if total else normed


def linear_sum(graph: Graph, names: tuple[str, str], rows: str, image: Image, *, exponent: int) -> Image:
    """The image plus the Linear ``names[0]`` of `rows` (B*h*w, in), named ``names[1]``.

    Image and result hold 2^-`exponent` of their values. On a GPU, ONNX Runtime adds the bias of a Gemm in a launch of
    its own. Its norm of sums adds the bias and the image in one; the graph reads the sum alone."""
    name, total = names
    if graph.options.target is not Target.ORT or name in graph.options.quantized:
        made = image.with_rows(graph.linear(name, rows, exponent=exponent, bias_exponent=exponent))
        return image.with_last(graph.node("Add", total, image.last, made.last))
    product = graph.product(name, rows, alpha=2.0**-exponent)
    ones, zeros = graph.full(image.channels), graph.full(image.channels, 0.0)
    operands = (product, image.rows, ones, zeros, graph.scaled_weight(f"{name}.bias", exponent))
    outputs = [f"{total}/norm", "", "", f"{total}/rows"]
    return image.with_rows(graph.nodes("SkipLayerNormalization", outputs, *operands, domain=ORT_DOMAIN)[-1])


def batch_normalised(graph: Graph, name: str, image: Image, eps: float = 1e-5, *, learned: bool = True) -> Image:
    """The BatchNorm2d `name` with its stored statistics; affine-free unless its weight and bias are `learned`.

    It is always computed in fp32, like in PyTorch: runtimes fold the four vectors into two, and 16 bits would round
    them twice."""
    with graph.island():
        mean, variance = graph.weight(f"{name}.running_mean"), graph.weight(f"{name}.running_var")
        if learned:
            scale, shift = graph.weight(f"{name}.weight"), graph.weight(f"{name}.bias")
        else:
            scale, shift = graph.full(image.channels), graph.full(image.channels, 0.0)
        inputs = (graph.to_float(image.first), scale, shift, mean, variance)
        wide = graph.node("BatchNormalization", f"{name}/wide" if graph.halved else name, *inputs, epsilon=eps)
    value = graph.node("Cast", name, wide, to=graph.type) if graph.halved else wide
    return Image(graph, image.channels, first=value, size=image.size)


def resized(graph: Graph, name: str, image: Image, size: str) -> Image:
    """Resize bilinearly with align_corners to `size`; no node is written when the image has that size in any case."""
    if image.has_size(size):
        return image
    target = ("", "", graph.shape(graph.batch, image.channels, size))  # no region, no factors, but sizes
    mode = {"mode": "linear", "coordinate_transformation_mode": "align_corners"}
    if not graph.halved:
        made = graph.node("Resize", name, image.first, *target, **mode)
    else:  # fp32 as in the reference; TensorRT has no Resize in bf16
        wide = graph.node("Resize", f"{name}/wide", graph.to_float(image.first), *target, **mode)
        made = graph.node("Cast", name, wide, to=graph.type)
    return Image(graph, image.channels, first=made, size=size)


def pixel_shuffle(graph: Graph, name: str, image: Image, factor: int) -> str:
    """(B, c*factor^2, h, w) -> (B, c, factor*h, factor*w), with the channel order of torch's PixelShuffle."""
    if factor == 1:
        return graph.node("Transpose", name, image.last, perm=[0, 3, 1, 2])
    if graph.options.target is not Target.ORT and not graph.options.cuda_bf16:
        return graph.node("DepthToSpace", name, image.first, blocksize=factor, mode="CRD")
    # One kernel in place of a Transpose and a DepthToSpace, and CUDA has it in bf16.
    channels = image.channels // factor**2
    split = graph.shape(graph.batch, image.size, channels, factor, factor)
    parts = graph.node("Reshape", f"{name}/parts", image.last, split)  # (B, h, w, c, dy, dx)
    moved = graph.node("Transpose", f"{name}/moved", parts, perm=[0, 3, 1, 4, 2, 5])
    size = graph.node("Mul", f"{name}/size", image.size, graph.integers(factor))
    return graph.node("Reshape", name, moved, graph.shape(graph.batch, channels, size))


def edge_padded(graph: Graph, name: str, image: Image) -> str:
    """The image with its edges repeated once on every side: (B, c, h + 2, w + 2)."""
    if not graph.options.cuda_bf16:
        return graph.node("Pad", name, image.first, graph.integers(0, 0, 1, 1, 0, 0, 1, 1), mode="edge")
    value, last = image.first, graph.integers(-1)
    for axis, out in ((2, f"{name}/rows"), (3, name)):
        on = graph.integers(axis)
        before = graph.node("Slice", f"{out}/before", value, graph.integers(0), graph.integers(1), on)
        after = graph.node("Slice", f"{out}/after", value, last, graph.integers(LAST), on)
        value = graph.node("Concat", out, before, value, after, axis=axis)
    return value


def channel_means(graph: Graph, name: str, image: Image) -> str:
    """(B, c, 1, 1): the mean over the pixels of each channel."""
    if not graph.options.cuda_bf16:
        return graph.node("GlobalAveragePool", name, image.first)
    return graph.node(
        "Cast", name, graph.node("GlobalAveragePool", f"{name}/wide", graph.to_float(image.first)), to=graph.type
    )


def leaky_relu(graph: Graph, name: str, value: str, slope: float) -> str:
    """x where x is positive, else slope * x, for a slope between 0 and 1."""
    if not graph.options.cuda_bf16:
        return graph.node("LeakyRelu", name, value, alpha=slope)
    return graph.node("Max", name, value, graph.node("Mul", f"{name}/small", value, graph.scalar(slope)))


@dataclass(frozen=True)
class AttentionInputs:
    """The inputs of softmax(q kᵀ / √d + mask) v, computed by `heads` heads of d = width / heads channels."""

    qkv: tuple[str, str, str]  # q (B*n, width) or (B, n, width); k and v the same for m tokens
    width: int
    heads: int
    mask: str | None = None  # (B or 1, 1, n, m) fp32, added to the scores

    @property
    def scale(self) -> float:
        return float((self.width // self.heads) ** -0.5)


def self_attention(
    graph: Graph,
    name: str,
    rows: str,
    *,
    heads: int,
    mask: str | None = None,
) -> str:
    """Multi-head attention of the tokens `rows` (B*n, width) to themselves, giving (B*n, width).

    `mask` is that of `AttentionInputs`."""
    query, key, value = graph.linears(name, ("q_proj", "k_proj", "v_proj"), rows)
    width = graph.width(f"{name}.q_proj")
    mixed = attend(graph, name, AttentionInputs((query, key, value), width, heads, mask))
    return graph.linear(f"{name}.out_proj", graph.rows(mixed, width))


def attend(graph: Graph, name: str, inputs: AttentionInputs) -> str:
    """The attention of `inputs` in the operators of the graph's target: (B, n, width)."""
    return ATTENTIONS[graph.options.target](graph, name, inputs)


def _attend_in_parts(graph: Graph, name: str, inputs: AttentionInputs) -> str:
    query, key, value = inputs.qkv
    split = graph.shape(graph.batch, -1, inputs.heads, inputs.width // inputs.heads)  # (B, n, heads, d)

    def per_head(rows: str, perm: list[int]) -> str:
        parts = graph.node("Reshape", f"{rows}/heads", rows, split)
        return graph.node("Transpose", f"{rows}/per_head", parts, perm=perm)

    scale = graph.scalar(inputs.scale)
    q = per_head(graph.node("Mul", f"{name}/scaled", query, scale), [0, 2, 1, 3])  # q is smaller than the scores
    k, v = per_head(key, [0, 2, 3, 1]), per_head(value, [0, 2, 1, 3])  # (B, heads, d, m), (B, heads, m, d)
    scores = graph.to_float(graph.node("MatMul", f"{name}/scores", q, k))  # (B, heads, n, m) fp32
    graph.probe(scores)
    if inputs.mask is not None:
        scores = graph.node("Add", f"{name}/masked", scores, inputs.mask)
    weights = graph.to_compute(graph.node("Softmax", f"{name}/weights", scores, axis=-1))
    mixed = graph.node("MatMul", f"{name}/mixed", weights, v)  # (B, heads, n, d)
    mixed = graph.node("Transpose", f"{name}/transposed", mixed, perm=[0, 2, 1, 3])
    return graph.node("Reshape", f"{name}/tokens", mixed, graph.shape(graph.batch, -1, inputs.width))


def _tokens(graph: Graph, inputs: AttentionInputs) -> list[str]:
    """q, k and v as (B, tokens, width)."""
    shape = graph.shape(graph.batch, -1, inputs.width)
    return [graph.node("Reshape", f"{part}/tokens", part, shape) for part in inputs.qkv]


def _attend_in_ort(graph: Graph, name: str, inputs: AttentionInputs) -> str:
    """ONNX Runtime's own operator. Its mask has the type of the queries."""
    mask = [graph.to_compute(inputs.mask)] if inputs.mask else []
    operands = [*_tokens(graph, inputs), *(["", "", *mask] if mask else [])]  # no bias, no padding mask
    attributes = {"num_heads": inputs.heads, "scale": inputs.scale, "domain": ORT_DOMAIN}
    return graph.node("MultiHeadAttention", f"{name}/tokens", *operands, **attributes)


def _attend_natively(graph: Graph, name: str, inputs: AttentionInputs) -> str:
    """The operator of opset 23 if TensorRT has kernels for it: half precision, and heads of a multiple of 16 channels.

    TensorRT refuses softmax_precision, and sums in fp32 by itself."""
    if not graph.halved or inputs.width // inputs.heads % 16:
        return _attend_in_parts(graph, name, inputs)
    operands = [*_tokens(graph, inputs), *([graph.to_compute(inputs.mask)] if inputs.mask else [])]
    attributes = {"q_num_heads": inputs.heads, "kv_num_heads": inputs.heads, "scale": inputs.scale}
    return graph.node("Attention", f"{name}/tokens", *operands, **attributes)


ATTENTIONS: Mapping[Target, Callable[[Graph, str, AttentionInputs], str]] = {
    Target.PORTABLE: _attend_in_parts,
    Target.ORT: _attend_in_ort,
    Target.TENSORRT: _attend_natively,
}
