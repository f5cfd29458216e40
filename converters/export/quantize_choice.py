"""Chooses the Linears to quantise: measures, for each that may be, what its product loses on seeded activations.

The float graph runs once, giving out what goes into every candidate. Then each weight is read once, some rows at a
time, and its product with those activations is taken twice, with the weight and with what its quantised form stands
for. The figure is the relative L2 of the difference, before the bias: for the last Linear of a block the error of all
the block adds to its stream, for the others the error of what the block goes on with.
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

from ...runtime.engines.onnxruntime import import_onnxruntime
from ...schemas.errors import EngineError, ExportError
from ...schemas.ports import ports_of
from ...schemas.quantization import Quantization, Scheme, linears, stored_tensors
from ...schemas.stages import NetworkConfig, TextEncoderConfig, UNetConfig
from ...schemas.tensors import expected_tensors
from ...storage.safetensors_reader import TensorRange
from ..onnx import Weight, write_graph
from .quantize_file import matrix_of, quantize_rows, row_blocks
from .quantize_values import Floats, dequantize, quantize

# A layer may lose so many times what rounding loses on normal numbers, both weights and activations. More means that
# a few values far out have taken the scale from all others; rounding then costs more than its bits are worth.
TOLERATED = 2.0

MAX_ROWS = 512  # of activations that a product is measured on
SEEDS = (0,)
GRAPH_NAME = ".calibration.onnx"

Inputs = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class LinearChoice:
    """A Linear: the relative error of its product when quantised (None: not measured), what is tolerated of it, why
    it stays float (None: it does not), and the bytes of its weight as it was and as it will be."""

    module: str
    error: float | None
    tolerated: float | None
    reason: str | None
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class QuantizationChoice:
    """Which Linears of a network are quantised, and why the others are not."""

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
    inputs: Sequence[Inputs] = (),
) -> QuantizationChoice:
    """Measure every Linear that may be quantised, and choose those that lose no more than `threshold` (relative L2;
    by default TOLERATED times what rounding loses on normal numbers in as many columns).

    `tensors` lie in files of one folder, in which a graph is written for a moment. `inputs` are what to measure on,
    port values of the network; by default seeded noise of a small size, random words for a text encoder.
    Needs onnxruntime, and memory for the activations; of weights stored in 16 bits up to all may be held in fp32 while
    the graph runs, those stored in fp32 stay mapped.
    Raises ExportError for weights that cannot be used."""
    expected = expected_tensors(config)
    described = list(linears(config.stage, expected))
    measured = [m for m, shape, reason in described if reason is None and _unfit(scheme, shape[1]) is None]
    rows = _rows_into(config, tensors, measured, inputs or [seeded_inputs(config, seed) for seed in SEEDS])
    layers = []
    for module, shape, reason in described:
        error = limit = None
        before = tensors[f"{module}.weight"].nbytes
        after = sum(tensor.nbytes for tensor in stored_tensors(scheme, module, *shape).values())
        if module in rows:
            error = product_error(rows[module], _both_forms(module, matrix_of(tensors, module), scheme), scheme)
            limit = threshold if threshold is not None else TOLERATED * normal_error(scheme, shape[1])
            if not error <= limit:
                reason = f"loses {error:.2%}, tolerated are {limit:.2%}"
        elif reason is None:
            reason = _unfit(scheme, shape[1])
        layers.append(LinearChoice(module, error, limit, reason, before, before if reason else after))
    return QuantizationChoice(scheme, tuple(layers))


def _unfit(scheme: Scheme, columns: int) -> str | None:
    """Why matrices of so many columns cannot or need not be quantised."""
    if not scheme.fits(columns):
        return f"its {columns} columns are no multiple of the block size {scheme.block_size}"
    row = sum(tensor.nbytes for tensor in stored_tensors(scheme, "", 1, columns).values())
    return None if row < 2 * columns else f"its {columns} columns take no less room when quantised"


def _both_forms(module: str, part: TensorRange, scheme: Scheme) -> Iterator[tuple[Floats, Floats]]:
    for _, rows in row_blocks(part):
        yield rows, dequantize(quantize_rows(module, part, rows, scheme), scheme)


def product_error(activations: Floats, weight: Iterable[tuple[Floats, Floats]], scheme: Scheme) -> float:
    """‖X Wᵀ - X' W'ᵀ‖ / ‖X Wᵀ‖ for activations X (n, columns), and rows of the weight W with what the graph has in
    their place, W'; X' is what it has in the place of X. 0 where both products are."""
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

    int8-dynamic: as DynamicQuantizeLinear does, 0 to 255 between the least and the greatest value of all. Products
    in int8 of MatMulNBits: by row and block, the largest magnitude becoming 127."""
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
    """The `product_error` of normal numbers: what rounding costs where nothing stands out."""
    rng = np.random.default_rng(0)
    activations = rng.standard_normal((128, columns), np.float32)
    weight = rng.standard_normal((64, columns), np.float32)
    return product_error(activations, [(weight, dequantize(quantize(weight, scheme), scheme))], scheme)


def seeded_inputs(config: NetworkConfig, seed: int) -> dict[str, NDArray[Any]]:
    """Noise for the network's ports, two in a batch, at a small size; timesteps spread over 0..1. Text is random words
    between the two marks, of two lengths."""
    rng = np.random.default_rng(seed)
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


def _rows_into(
    config: NetworkConfig, tensors: Mapping[str, TensorRange], modules: Sequence[str], inputs: Sequence[Inputs]
) -> dict[str, Floats]:
    """The input of each module, (n, columns): at most MAX_ROWS rows, evenly spread over all rows."""
    if not modules:
        return {}
    weights = {name: Weight(t.dtype, t.shape, t.path.name, t.offset, t.nbytes) for name, t in tensors.items()}
    model = write_graph(config, weights)
    source = {part: node.input[0] for node in model.graph.node for part in _modules_of(node)}
    values = list(dict.fromkeys(source[module] for module in modules))
    model.graph.output.extend(helper.make_tensor_value_info(v, TensorProto.FLOAT, None) for v in values)
    folder = next(iter(tensors.values())).path.parent
    runs = [_run(model, folder, values, given) for given in inputs]
    found = {value: np.concatenate([run[value] for run in runs]) for value in values}
    return {module: _thinned(found[source[module]]) for module in modules}


def _modules_of(node: onnx.NodeProto) -> list[str]:
    """The modules whose product `node` is: ``a.to_q+to_k`` is that of two. Further passes (``@1``) do not count."""
    if node.op_type != "Gemm" or "@" in node.name:
        return []
    prefix, _, parts = node.name.rpartition(".")
    return [f"{prefix}.{part}" for part in parts.split("+")]


def _run(model: onnx.ModelProto, folder: Path, values: Sequence[str], inputs: Inputs) -> dict[str, Floats]:
    try:
        onnxruntime = import_onnxruntime("cpu")
    except EngineError as error:
        raise ExportError(
            "what quantisation loses is measured with ONNX Runtime: pip install 'cascadekit[cpu]'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")  # weights stay mapped, not copied
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # what is freed is free
    path = folder / GRAPH_NAME
    try:
        onnx.save_model(model, path)
        session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
        )
        return dict(zip(values, session.run(list(values), dict(inputs)), strict=True))
    except Exception as error:  # onnxruntime has a class of its own for each status code
        raise ExportError(f"{folder}: the float graph cannot be run to measure quantisation: {error}") from error
    finally:
        path.unlink(missing_ok=True)


def _thinned(rows: Floats) -> Floats:
    step = -(-len(rows) // MAX_ROWS)
    return rows[::step]
