"""Layers of several networks: feature maps in either memory layout, convolutions on them, and attention."""

from typing import Any

from ...schemas.tensors import Shape
from .builder import Graph


class Image:
    """A feature map in the layout it was made in; the other layout is written when first asked for.

    Convolutions want channels first, everything else channels last. Asking late means that a convolution followed
    by another has no Transpose between them, and that a map with several users is transposed once.
    """

    def __init__(
        self, graph: Graph, channels: int, *, first: str | None = None, last: str | None = None, size: str | None = None
    ) -> None:
        self.graph = graph
        self.channels = channels
        self._first = first
        self._last = last
        self._size = size

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
        """Whether this image is known to have `size`, whatever is fed."""
        return self._size == size

    def with_last(self, value: str, channels: int | None = None) -> "Image":
        """Another image of this size: `value` is (B, h, w, channels)."""
        return Image(self.graph, channels or self.channels, last=value, size=self.size)

    def with_rows(self, value: str, channels: int | None = None) -> "Image":
        """Another image of this size: `value` is (B*h*w, channels)."""
        channels = channels or self.channels
        shape = self.graph.shape(self.graph.batch, self.size, channels)
        return self.with_last(self.graph.once("Reshape", f"{value}/last", value, shape), channels)


def pointwise(graph: Graph, name: str, image: Image, *, bias: bool = True) -> Image:
    """The 1x1 convolution `name`, as the matrix product it is."""
    return image.with_rows(graph.linear(name, image.rows, bias=bias), graph.width(name))


def convolution(
    graph: Graph,
    name: str,
    value: str,
    channels: int,
    *,
    dims: Shape | None = None,
    size: str | None = None,
    bias: bool = True,
    **attributes: Any,
) -> Image:
    """The convolution `name` of `value` (B, c, h, w); its weight read as `dims` where they are given.

    `channels` is what comes out, `size` the size of the result where it is known."""
    inputs = [value, graph.weight(f"{name}.weight", dims), *([graph.weight(f"{name}.bias")] if bias else [])]
    return Image(graph, channels, first=graph.node("Conv", name, *inputs, **attributes), size=size)


def transposed_convolution(graph: Graph, name: str, image: Image, channels: int, **attributes: Any) -> Image:
    """The ConvTranspose2d `name`, to `channels`."""
    weight, bias = graph.weight(f"{name}.weight"), graph.weight(f"{name}.bias")
    return Image(graph, channels, first=graph.node("ConvTranspose", name, image.first, weight, bias, **attributes))


def normalised(graph: Graph, name: str, image: Image, eps: float = 1e-6) -> Image:
    """Affine-free LayerNorm over the channels."""
    return image.with_last(graph.layer_norm(name, image.last, image.channels, eps=eps))


def batch_normalised(graph: Graph, name: str, image: Image, eps: float = 1e-5, *, learned: bool = True) -> Image:
    """The BatchNorm2d `name` with its stored statistics; without `learned` weight and bias affine-free."""
    mean, variance = graph.weight(f"{name}.running_mean"), graph.weight(f"{name}.running_var")
    if learned:
        scale, shift = graph.weight(f"{name}.weight"), graph.weight(f"{name}.bias")
    else:
        scale = graph.ones(image.channels)
        shift = graph.once("Sub", f"zeros[{image.channels}]", scale, scale)
    value = graph.node("BatchNormalization", name, image.first, scale, shift, mean, variance, epsilon=eps)
    return Image(graph, image.channels, first=value, size=image.size)


def resized(graph: Graph, name: str, image: Image, size: str) -> Image:
    """Bilinear with align_corners to `size`; nothing is written where the image has that size by construction."""
    if image.has_size(size):
        return image
    sizes = graph.shape(graph.batch, image.channels, size)
    mode = {"mode": "linear", "coordinate_transformation_mode": "align_corners"}
    return Image(graph, image.channels, first=graph.node("Resize", name, image.first, "", "", sizes, **mode), size=size)


def pixel_shuffle(graph: Graph, name: str, image: Image, factor: int) -> str:
    """(B, c*factor^2, h, w) -> (B, c, factor*h, factor*w), channels ordered as torch's PixelShuffle has them."""
    if factor == 1:
        return graph.node("Transpose", name, image.last, perm=[0, 3, 1, 2])
    return graph.node("DepthToSpace", name, image.first, blocksize=factor, mode="CRD")


def attention(
    graph: Graph,
    name: str,
    queries: str,
    keys: str,
    width: int,
    heads: int,
    *,
    projections: tuple[str, str, str, str],
    mask: str | None = None,
) -> str:
    """Multi-head attention of `queries` (B*n, width) to `keys` (B*m, width), giving (B*n, width).

    `projections` are the module names of q, k, v and the output; `mask` (B or 1, 1, n, m) is added to the scores.
    """
    query, key, value, out = (f"{name}.{projection}" for projection in projections)
    split = graph.shape(graph.batch, -1, heads, width // heads)  # (B, n, heads, d)

    def per_head(projection: str, rows: str, perm: list[int]) -> str:
        parts = graph.node("Reshape", f"{projection}/heads", rows, split)
        return graph.node("Transpose", f"{projection}/per_head", parts, perm=perm)

    scale = graph.scalar((width // heads) ** -0.5)
    q = graph.node("Mul", f"{query}/scaled", graph.linear(query, queries), scale)  # here it is smaller than the scores
    q = per_head(query, q, [0, 2, 1, 3])  # (B, heads, n, d)
    k = per_head(key, graph.linear(key, keys), [0, 2, 3, 1])  # (B, heads, d, m)
    v = per_head(value, graph.linear(value, keys), [0, 2, 1, 3])  # (B, heads, m, d)
    scores = graph.node("MatMul", f"{name}/scores", q, k)  # (B, heads, n, m)
    if mask is not None:
        scores = graph.node("Add", f"{name}/masked", scores, mask)
    weights = graph.node("Softmax", f"{name}/weights", scores, axis=-1)
    mixed = graph.node("MatMul", f"{name}/mixed", weights, v)  # (B, heads, n, d)
    mixed = graph.node("Transpose", f"{name}/tokens", mixed, perm=[0, 2, 1, 3])
    return graph.linear(out, graph.rows(mixed, width))
