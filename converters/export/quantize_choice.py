"""Chooses the Linears to quantise, by the error of each Linear's product on seeded activations.

The float graph runs once; its outputs are the inputs of all candidates. Then each weight is read once, some rows at a
time. Its product with the activations is computed twice: with the weight, and with the dequantised weight. The error
is the relative L2 of the difference, before the bias. For the last Linear of a block that is the error of everything
that the block adds to its stream.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from ...runtime.engines.onnxruntime import open_session
from ...schemas.errors import EngineError, ExportError
from ...schemas.ports import ports_of
from ...schemas.quantization import TOLERATED, Quantization, Scheme, linears, stored_tensors
from ...schemas.stages import NetworkConfig, TextEncoderConfig, UNetConfig
from ...schemas.tensors import expected_tensors
from ...storage.safetensors_reader import TensorRange
from ..onnx import write_graph
from .quantize_file import quantize_rows, row_blocks
from .quantize_values import Floats, dequantize, quantize

MAX_ROWS = 512  # rows of activations that a product is measured on
GRAPH_NAME = ".calibration.onnx"


@dataclass(frozen=True)
class LinearChoice:
    """The decision on one Linear."""

    module: str
    error: float | None  # relative L2 of its product when quantised; None: not measured
    tolerated: float | None  # the largest error at which it is quantised
    reason: str | None  # why it stays float; None: it is quantised
    bytes_before: int  # of its weight
    bytes_after: int


@dataclass(frozen=True)
class QuantizationChoice:
    """The decision on every Linear of a network."""

    scheme: Scheme
    layers: tuple[LinearChoice, ...]

    @property
    def chosen(self) -> frozenset[str]:
        return frozenset(layer.module for layer in self.layers if layer.reason is None)


def choose_layers(
    config: NetworkConfig,
    tensors: Mapping[str, TensorRange],
    scheme: Scheme,
    *,
    threshold: float | None = None,
) -> QuantizationChoice:
    """Measure every Linear that may be quantised, and choose those whose error is at most `threshold` (relative L2).

    The default threshold is TOLERATED times the error of rounding normal numbers in as many columns. `tensors` are in
    files of one folder; the float graph is written into that folder and removed after the run.

    Needs onnxruntime, and memory for the activations. Weights in fp32 stay mapped while the graph runs; weights in 16
    bits may be held in fp32. Raises ExportError for weights that cannot be used, EngineError without onnxruntime."""
    expected = expected_tensors(config)
    described = list(linears(config.stage, expected))
    measured = [m for m, shape, reason in described if reason is None and _unfit(scheme, shape[1]) is None]
    rows = _rows_into(config, tensors, measured)
    layers = []
    for module, shape, reason in described:
        error = limit = None
        before = tensors[f"{module}.weight"].nbytes
        after = sum(tensor.nbytes for tensor in stored_tensors(scheme, module, *shape).values())
        if module in rows:
            error = product_error(rows[module], _both_forms(module, tensors[f"{module}.weight"], scheme), scheme)
            limit = threshold if threshold is not None else TOLERATED * normal_error(scheme, shape[1])
            if not error <= limit:
                reason = f"error {error:.2%}, tolerated {limit:.2%}"
        elif reason is None:
            reason = _unfit(scheme, shape[1])
        after = before if reason else after
        layers.append(LinearChoice(module, error, limit, reason, bytes_before=before, bytes_after=after))
    return QuantizationChoice(scheme, tuple(layers))


def _unfit(scheme: Scheme, columns: int) -> str | None:
    """Why matrices of so many columns cannot or need not be quantised; None when they can."""
    if not scheme.fits(columns):
        return f"its {columns} columns are no multiple of the block size {scheme.block_size}"
    row = sum(tensor.nbytes for tensor in stored_tensors(scheme, "", 1, columns).values())
    return None if row < 2 * columns else f"its {columns} columns take no less room when quantised"


def _both_forms(module: str, part: TensorRange, scheme: Scheme) -> Iterator[tuple[Floats, Floats]]:
    for rows in row_blocks(part):
        yield rows, dequantize(quantize_rows(module, part, rows, scheme), scheme)


def product_error(activations: Floats, weight: Iterable[tuple[Floats, Floats]], scheme: Scheme) -> float:
    """‖X Wᵀ - X' W'ᵀ‖ / ‖X Wᵀ‖ for activations X (n, columns) and a weight W (rows, columns).

    `weight` yields blocks of rows, float and dequantised (W'). X' are the activations as the quantised product
    rounds them. The result is 0 when both products are 0."""
    rounded = rounded_activations(activations, scheme)
    lost = whole = 0.0
    for rows, others in weight:
        product = activations @ rows.T
        other = rounded @ others.T
        whole += float(np.square(product, dtype=np.float64).sum())
        lost += float(np.square(product - other, dtype=np.float64).sum())
    return float(np.sqrt(lost / whole)) if whole else float(lost > 0)


def rounded_activations(rows: Floats, scheme: Scheme) -> Floats:
    """The activations that a quantised product multiplies instead of `rows` (n, columns); weight-only schemes: `rows`.

    int8-dynamic rounds like DynamicQuantizeLinear: 0 to 255 between the least and the greatest value of all.
    MatMulNBits with int8 products rounds each block of each row: its largest magnitude becomes 127."""
    if scheme.kind is Quantization.INT8_DYNAMIC:
        low, high = min(float(rows.min()), 0.0), max(float(rows.max()), 0.0)
        step = np.float32((high - low) / 255) or np.float32(1)
        middle = np.rint(-low / step)
        return np.asarray((np.clip(np.rint(rows / step) + middle, 0, 255) - middle) * step, np.float32)
    if not scheme.int8_products:
        return rows
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % scheme.block_size)))
    blocks = padded.reshape(len(rows), -1, scheme.block_size)
    step = np.abs(blocks).max(axis=2, keepdims=True) / np.float32(127)
    values = np.rint(blocks / np.where(step == 0, np.float32(1), step)) * step
    return np.asarray(values.reshape(len(rows), -1)[:, : rows.shape[1]], np.float32)


@cache
def normal_error(scheme: Scheme, columns: int) -> float:
    """The `product_error` of normal numbers, which have no outliers."""
    rng = np.random.default_rng(0)
    activations = rng.standard_normal((128, columns), np.float32)
    weight = rng.standard_normal((64, columns), np.float32)
    return product_error(activations, [(weight, dequantize(quantize(weight, scheme), scheme))], scheme)


def seeded_inputs(config: NetworkConfig) -> dict[str, NDArray[Any]]:
    """Seeded values for the network's ports, a batch of two at a small size; timesteps are 0.9 and 0.3.

    Ports get normal noise. Text is random words before the end token, in two lengths."""
    rng = np.random.default_rng(0)
    if isinstance(config, TextEncoderConfig):
        length = config.max_position_embeddings
        ids = rng.integers(0, min(config.vocab_size, config.eos_token_id), (2, length))
        mask = (np.arange(length) < np.array([[length], [1 + length // 3]])).astype(np.int64)
        ids[:, -1] = ids[1, length // 3 :] = config.eos_token_id
        return {"input_ids": ids.astype(np.int64), "attention_mask": mask}
    sizes = _small_sizes(config)
    values: dict[str, NDArray[Any]] = {}
    for port in ports_of(config).inputs:
        dims = [sizes.get(dim, 1) if isinstance(dim, str) else dim for dim in port.dims]
        values[port.name] = rng.standard_normal(dims).astype(np.float32)
    if "timestep_ratio" in values:
        values["timestep_ratio"] = np.array([0.9, 0.3], np.float32)
    return values


def _small_sizes(config: NetworkConfig) -> dict[str, int]:
    """A map of 8 x 8 at the outermost level, or of 2 x 2 at the innermost where levels halve it."""
    halvings = config.levels - 1 if isinstance(config, UNetConfig) and config.switch_level is None else 0
    patch = config.patch_size if isinstance(config, UNetConfig) else 1
    side = patch * max(8, 2 << halvings)
    return {"batch": 2, "height": side, "width": side, "tokens": 77, "images": 1, "effnet_height": 4, "effnet_width": 4}


def _rows_into(config: NetworkConfig, tensors: Mapping[str, TensorRange], modules: Sequence[str]) -> dict[str, Floats]:
    """The input of each module, (n, columns): at most MAX_ROWS rows, evenly spread over all rows."""
    if not modules:
        return {}
    model = write_graph(config, tensors)
    source = {part: node.input[0] for node in model.graph.node for part in _modules_of(node)}
    values = list(dict.fromkeys(source[module] for module in modules))
    model.graph.output.extend(helper.make_tensor_value_info(v, TensorProto.FLOAT, None) for v in values)
    folder = next(iter(tensors.values())).path.parent
    found = _run(model, folder, values, seeded_inputs(config))
    return {module: _thinned(found[source[module]]) for module in modules}


def _modules_of(node: onnx.NodeProto) -> list[str]:
    """The modules whose product `node` is: ``a.to_q+to_k`` is that of two. Further passes (``@1``) do not count."""
    if node.op_type != "Gemm" or "@" in node.name:
        return []
    prefix, _, parts = node.name.rpartition(".")
    return [f"{prefix}.{part}" for part in parts.split("+")]


def _run(
    model: onnx.ModelProto, folder: Path, values: Sequence[str], inputs: Mapping[str, NDArray[Any]]
) -> dict[str, Floats]:
    path = folder / GRAPH_NAME
    try:
        onnx.save_model(model, path)
        return dict(zip(values, open_session(path).run(list(values), dict(inputs)), strict=True))
    except EngineError:
        raise
    except Exception as error:  # onnxruntime has a class of its own for each status code
        raise ExportError(f"{folder}: the float graph cannot be run to measure quantisation: {error}") from error
    finally:
        path.unlink(missing_ok=True)


def _thinned(rows: Floats) -> Floats:
    step = -(-len(rows) // MAX_ROWS)
    return rows[::step]
