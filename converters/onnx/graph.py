"""The operations that every network has, added to the graph under construction."""

from collections.abc import Sequence

from ...schemas.precision import Target
from .graph_builder import ORT_DOMAIN, GraphBuilder
from .quantized import quantized_linear


class Graph(GraphBuilder):
    """A `GraphBuilder` with Linears, norms and activations; their names are those of PyTorch modules."""

    def linear(
        self,
        name: str,
        rows: str,
        *,
        bias: bool = True,
        alpha: float = 1.0,
        exponent: int = 0,
        bias_exponent: int = 0,
    ) -> str:
        """(n, in) -> (n, out): a Linear or a 1x1 convolution, its weight in torch's orientation.

        The product without the bias is multiplied by `alpha`, the weight by 2^-`exponent`, and the bias by
        2^-`bias_exponent`. ONNX Runtime multiplies the product by both where the weight needs no cast: its products add
        in fp32, and folding a scaled weight would take it through the host."""
        biases = [self.scaled_weight(f"{name}.bias", bias_exponent)] if bias else []
        if name in self.options.quantized:
            return quantized_linear(self, name, rows, *biases, factor=alpha * 2.0**-exponent)
        if self.options.target is Target.ORT and self.is_stored_as_computed(f"{name}.weight"):
            alpha, exponent = alpha * 2.0**-exponent, 0
        weight = self.scaled_weight(f"{name}.weight", exponent, self._expected[f"{name}.weight"][:2])
        return self.gemm(name, rows, weight, *biases, alpha=alpha)

    def activated(self, linear: str, gelu: str, rows: str, *, alpha: float = 1.0) -> str:
        """The GELU `gelu` of the Linear `linear`, (n, in) -> (n, out); `alpha` as for `linear`.

        ONNX Runtime adds the bias in the operator of the GELU: on a GPU a Gemm writes its whole result for the bias."""
        if self.options.target is not Target.ORT or linear in self.options.quantized:
            value = self.linear(linear, rows, alpha=alpha)
            self.probe(value)
            return self.node("Gelu", gelu, value)
        product = self.product(linear, rows, alpha=alpha)
        return self.node("BiasGelu", gelu, product, self.weight(f"{linear}.bias"), domain=ORT_DOMAIN)

    def product(self, linear: str, rows: str, *, alpha: float) -> str:
        """`alpha` times the Linear `linear` without its bias, (n, in) -> (n, out), for ONNX Runtime alone."""
        weight = self.weight(f"{linear}.weight", self.shape_of(f"{linear}.weight")[:2])
        attributes = {"alpha": alpha, "transB": 1, "domain": ORT_DOMAIN}
        return self.node("FusedMatMul", f"{linear}/product", rows, weight, **attributes)

    def linears(self, prefix: str, parts: Sequence[str], rows: str) -> list[str]:
        """The Linears ``prefix.part`` of the same rows, in one product if their weights are adjacent in one file."""
        names = [f"{prefix}.{part}" for part in parts]
        if not self.options.quantized.isdisjoint(names):
            return [self.linear(name, rows) for name in names]
        packed = f"{prefix}.{'+'.join(parts)}"
        weight = self.packed(f"{packed}.weight", [f"{name}.weight" for name in names])
        bias = self.packed(f"{packed}.bias", [f"{name}.bias" for name in names])
        if weight is None or bias is None:
            return [self.linear(name, rows) for name in names]
        product = self.gemm(packed, rows, weight, bias)
        return self.split_widths(f"{packed}/parts", product, 1, [self.width(name) for name in names], names)

    def layer_norm(
        self, name: str, value: str, width: int, *, eps: float, scale: str | None = None, shift: str | None = None
    ) -> str:
        """LayerNorm over the last axis, which has `width` channels; affine-free without `scale` and `shift`.

        Mean and variance are computed in fp32 in every precision (stash_type)."""
        inputs = [value, scale or self.full(width), *([shift] if shift else [])]
        return self.node("LayerNormalization", name, *inputs, axis=-1, epsilon=eps)

    def silu(self, name: str, value: str) -> str:
        return self.node("Mul", name, value, self.node("Sigmoid", f"{name}/sigmoid", value))

    def rows(self, value: str, width: int) -> str:
        """(..., width) -> (n, width)"""
        return self.once("Reshape", f"{value}/rows", value, self.integers(-1, width))
