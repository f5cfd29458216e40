"""ONNX Runtime's own operators for onnx's evaluator, in NumPy, written from docs/ContribOperators.md.

Sums are taken in fp32 and each result is rounded once to its type, as GPUs compute in 16 bits. ONNX Runtime's CPU
provider has none of these operators in bf16, and computes them in fp32 for fp16."""

from math import erf, sqrt
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

_ERF = np.vectorize(erf, otypes=[np.float32])


def _wide(*values: Any) -> list[Any]:
    return [None if value is None else np.asarray(value).astype(np.float32) for value in values]


class _Ort(OpRun):  # type: ignore[misc]
    op_domain = "com.microsoft"


class FusedMatMul(_Ort):
    def _run(self, a: Any, b: Any, alpha: float = 1.0, transA: int = 0, transB: int = 0, **rest: Any) -> Any:  # noqa: N803
        assert not transA
        assert not any(rest.values())
        left, right = _wide(a, b)
        return ((alpha * (left @ (right.T if transB else right))).astype(a.dtype),)


class BiasGelu(_Ort):
    def _run(self, a: Any, b: Any) -> Any:
        assert b.ndim == 1
        value = np.add(*_wide(a, b))
        return ((0.5 * value * (1 + _ERF(value / sqrt(2)))).astype(a.dtype),)


class SkipLayerNormalization(_Ort):
    def _run(self, x: Any, skip: Any, gamma: Any, beta: Any = None, bias: Any = None, *, epsilon: float = 1e-12) -> Any:
        assert beta is None or not beta.any()
        assert x.shape[1:] == skip.shape[1:]
        assert skip.shape[0] in (1, x.shape[0])  # only the batch may be broadcast
        total = np.add(*_wide(x, skip)) + (0 if bias is None else _wide(bias)[0])
        centred = total - total.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
        normed = (centred / deviation * _wide(gamma)[0]).astype(x.dtype)
        if len(self.onnx_node.output) == 1:
            return (normed,)
        return normed, total.mean(-1, keepdims=True), 1 / deviation, total.astype(x.dtype)


class MultiHeadAttention(_Ort):
    def _run(self, query: Any, key: Any, value: Any, *rest: Any, num_heads: int, scale: float, **other: Any) -> Any:
        bias = rest[2] if len(rest) > 2 else None  # after the bias of the projections and the mask of keys
        assert not [x for n, x in enumerate(rest) if n != 2 and x is not None]
        assert bias is None or bias.dtype == query.dtype
        q, k, v = (np.moveaxis(x.reshape(*x.shape[:2], num_heads, -1), 2, 1) for x in _wide(query, key, value))
        scores = scale * (q @ np.swapaxes(k, -1, -2)) + (0 if bias is None else _wide(bias)[0])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return (np.moveaxis(weights @ v, 1, 2).reshape(query.shape).astype(query.dtype),)


class ReduceL2(OpRun):  # type: ignore[misc]
    """With fp32 sums; onnx's own evaluator squares in the input's type, in which fp16 overflows at 256."""

    op_domain = ""

    def _run(self, x: Any, axes: Any = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Any:
        squares = np.square(_wide(x)[0])
        return (np.sqrt(squares.sum(tuple(axes), keepdims=bool(keepdims))).astype(x.dtype),)


OPERATORS = [FusedMatMul, BiasGelu, SkipLayerNormalization, MultiHeadAttention, ReduceL2]
