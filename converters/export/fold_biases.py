"""Computes the biases of ``schemas.folded_biases`` from the weights of a stage, into a file beside them."""

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...schemas.folded_biases import FoldedBias, folded_biases
from ...schemas.stages import NetworkConfig
from ...schemas.tensors import expected_tensors
from ...storage.float_rows import float_rows
from ...storage.safetensors_plan import CalculatedRange, TensorPlan
from ...storage.safetensors_reader import TensorRange, read_header
from ...storage.safetensors_writer import write_safetensors
from ..onnx.external_weights import problem_of

BLOCK_VALUES = 1 << 21  # values of a weight that are in memory at a time


def fold_biases(
    config: NetworkConfig, tensors: Mapping[str, TensorRange], path: Path, *, quantized: Collection[str] = ()
) -> dict[str, TensorRange]:
    """Write the biases of a network to a new file at `path`, in fp32; returns the range of each.

    Those of `quantized` Linears are left out, and those whose parts cannot be used: the graph's writer names these. No
    file is written if none is left. Raises ConversionError when a source cannot be read or the disk is full."""
    shapes = expected_tensors(config)
    plans = {}
    for folded in folded_biases(config):
        parts = (folded.weight, folded.bias, folded.beta)
        if folded.linear not in quantized and not any(problem_of(tensors.get(name), shapes[name]) for name in parts):
            values = CalculatedRange(4 * folded.width, partial(_values, folded, tensors))
            plans[folded.name] = TensorPlan("F32", (folded.width,), (values,))
    if not plans:
        return {}
    write_safetensors(path, plans, {"format": "pt"})
    return read_header(path).tensors


def depends_on(config: NetworkConfig, names: Collection[str]) -> bool:
    """True if one of the tensors `names` is a part of a bias."""
    return any(name in names for each in folded_biases(config) for name in (each.weight, each.bias, each.beta))


def _values(folded: FoldedBias, tensors: Mapping[str, TensorRange]) -> Iterator[NDArray[np.float32]]:
    """The bias in one array: weight times beta, plus bias, some rows of the weight at a time."""
    beta, bias = (_vector(tensors[name]) for name in (folded.beta, folded.bias))
    rows = float_rows(tensors[folded.weight], max(1, BLOCK_VALUES // len(beta)))
    product = np.concatenate([block @ beta for block in rows])
    yield np.ascontiguousarray(product + bias, "<f4")


def _vector(tensor: TensorRange) -> NDArray[np.float32]:
    return np.concatenate([block.reshape(-1) for block in float_rows(tensor, tensor.shape[0])])
