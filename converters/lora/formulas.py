"""Calculates the effect of an adapter on a weight, a block of rows at a time.

The definitions are those of LyCORIS (https://github.com/KohakuBlueleaf/LyCORIS, lycoris/functional) and, for DoRA, of
PEFT.

| algorithm | formula |
|---|---|
| LoRA | ΔW = alpha/r · up @ down |
| LoHa | ΔW = alpha/r · (w1_a @ w1_b) * (w2_a @ w2_b) |
| LoKr | ΔW = alpha/r · w1 ⊗ w2, each whole or a product of two; not scaled when both are whole |
| full | ΔW is in the file, not scaled |
| DoRA | W' = magnitude · (W + ΔW) / ‖W + ΔW‖, norms over inputs or over outputs |

OneTrainer's product for a depthwise convolution is one row, which is folded into the weight's shape. LyCORIS uses
Tucker's cores for kernels larger than 1x1; they are multiplied into the right factor first.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np

from ...schemas.lora_keys import Algorithm
from .adapters import Adapter, Axis
from .encoding import Array

RowReader = Callable[[int, int], Array]  # rows start:stop of a weight flattened to [out, everything else]

BLOCK_VALUES = 1 << 22  # numbers of a weight that are calculated at a time: 16 MiB in float32


def blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Yield the first and last row (exclusive) of blocks of at most BLOCK_VALUES numbers."""
    step = max(1, BLOCK_VALUES // max(1, columns))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def change_rows(adapter: Adapter, dtype: type[np.floating]) -> RowReader:
    """Return a reader of rows of ΔW at strength 1. The factors are read now and kept."""
    values = {name: factor.load().astype(dtype) for name, factor in adapter.factors.items()}
    scale = dtype(adapter.scale)
    match adapter.algorithm:
        case Algorithm.LORA:
            up, down = _pair(values, "lora_up", "lora_down", "lora_mid", transposed=False)
            up = up * scale  # the smaller matrix
            return _rows_of(up @ down, adapter) if adapter.folded else lambda start, stop: up[start:stop] @ down
        case Algorithm.LOHA:
            a1, b1 = _pair(values, "hada_w1_a", "hada_w1_b", "hada_t1")
            a2, b2 = _pair(values, "hada_w2_a", "hada_w2_b", "hada_t2")
            if adapter.folded:
                return _rows_of((a1 @ b1) * (a2 @ b2) * scale, adapter)
            return lambda start, stop: (a1[start:stop] @ b1) * (a2[start:stop] @ b2) * scale
        case Algorithm.LOKR:
            return _kronecker(_whole(values, "lokr_w1"), _whole(values, "lokr_w2"), adapter.shape, scale)
        case Algorithm.FULL:
            return _rows_of(values["diff"], adapter)


def _rows_of(change: Array, adapter: Adapter) -> RowReader:
    """Return a reader of rows of a change that was calculated as a whole."""
    whole = change.reshape(adapter.shape[0], -1)
    return lambda start, stop: whole[start:stop]


def _pair(values: dict[str, Array], a: str, b: str, core: str, *, transposed: bool = True) -> tuple[Array, Array]:
    """Return two matrices whose product is the flattened change of the weight."""
    left, right = values[a], values[b]
    left = left.reshape(left.shape[:2])
    if core not in values:
        return left, right.reshape(right.shape[0], -1)
    right = right.reshape(right.shape[:2])
    middle = values[core]
    inner = np.einsum("ijk,jq->iqk", middle.reshape(*middle.shape[:2], -1), right)
    return (left.T if transposed else left), inner.reshape(inner.shape[0], -1)


def _whole(values: dict[str, Array], name: str) -> Array:
    if name in values:
        return values[name].reshape(values[name].shape[0], -1)
    a, b = _pair(values, f"{name}_a", f"{name}_b", f"{name.replace('w', 't')}")
    return a @ b


def _kronecker(w1: Array, w2: Array, shape: tuple[int, ...], scale: np.floating) -> RowReader:
    """Return a reader of rows of w1 ⊗ w2. Row i is row i // height of w1 times row i % height of w2."""
    height = w2.shape[0]
    kernel = math.prod(shape[2:])
    w2 = w2.reshape(height, -1, kernel)

    def rows(start: int, stop: int) -> Array:
        index = np.arange(start, stop)
        product = np.einsum("bn,bmk->bnmk", w1[index // height], w2[index % height])
        result: Array = product.reshape(stop - start, -1) * scale
        return result

    return rows


def applied(weight: RowReader, adapter: Adapter, strength: float, dtype: type[np.floating]) -> RowReader:
    """Return a reader of rows of the changed weight: W + strength · (W' - W), where W' has the full effect."""
    change, factor = change_rows(adapter, dtype), dtype(strength)
    if adapter.magnitude is None:
        return lambda start, stop: weight(start, stop) + factor * change(start, stop)
    magnitudes = adapter.magnitude.factor.load().astype(dtype)
    by_output = adapter.magnitude.axis is Axis.OUTPUT
    columns = None if by_output else _column_factors(weight, change, adapter.shape, magnitudes)

    def rows(start: int, stop: int) -> Array:
        before = weight(start, stop)
        moved = before + change(start, stop)
        if columns is None:
            norms = np.sqrt(np.einsum("ij,ij->i", moved, moved, dtype=np.float64))
            moved = moved * (magnitudes[start:stop] / norms).astype(dtype)[:, None]
        else:
            moved = moved * columns
        result: Array = before + factor * (moved - before)
        return result

    return rows


def _column_factors(weight: RowReader, change: RowReader, shape: tuple[int, ...], magnitudes: Array) -> Array:
    """Return magnitude / ‖W + ΔW‖ for every column; the norm of an input is taken over outputs and kernel."""
    squares = np.zeros(math.prod(shape[1:]), np.float64)
    for start, stop in blocks(shape[0], len(squares)):
        moved = weight(start, stop) + change(start, stop)
        squares += np.einsum("ij,ij->j", moved, moved, dtype=np.float64)
    kernel = math.prod(shape[2:])
    norms = np.sqrt(squares.reshape(-1, kernel).sum(axis=1))
    return np.repeat((magnitudes / norms).astype(magnitudes.dtype), kernel)
