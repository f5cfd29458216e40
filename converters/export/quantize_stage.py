"""Quantises a stage during an export: replaces float weights in the stage's folder by quantised ones."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median

from ...schemas.callbacks import StartFile
from ...schemas.stages import NetworkConfig
from ...storage.safetensors_plan import TensorPlan
from ...storage.safetensors_reader import TensorRange, read_header
from ...storage.safetensors_writer import write_safetensors
from ..onnx import GraphOptions
from .bundle_weights import StageWeights
from .export_options import ExportOptions
from .quantize_choice import QuantizationChoice, choose_layers
from .quantize_file import quantize_weights

QUANTIZED_NAME = "quantized.safetensors"
COLUMNS = ("Linear", "quantised", "error (median)", "error (worst)", "tolerated", "MB before", "MB after", "in float")

IN_EVERY_BLOCK = r"^\w+_blocks\.\d+\.\d+\.|^.*\.layers\.\d+\."


def quantize_stage(
    config: NetworkConfig,
    tensors: Mapping[str, TensorRange],
    graph_options: GraphOptions,
    options: ExportOptions,
    start_file: StartFile | None = None,
) -> tuple[StageWeights, GraphOptions, QuantizationChoice]:
    """Quantise the Linears among `tensors` whose error stays below the threshold of `options`.

    The float weights `tensors` are in one file of the bundle. The quantised weights are written to a second file
    beside it, and the first file is rewritten without them. `graph_options` are those of the float graphs.
    Returns all weights of the stage, the options of its graphs, and the choice.

    Raises ExportError when the weights cannot be used, ConversionError when they cannot be read or written."""
    scheme = options.scheme
    choice = choose_layers(config, tensors, scheme, threshold=options.quantize_threshold)
    (path,) = {tensor.path for tensor in tensors.values()}
    if not choice.chosen:
        return StageWeights("copy", dict(tensors), (path,)), graph_options, choice
    total = sum(layer.bytes_after for layer in choice.layers if layer.reason is None)
    progress = start_file(f"{config.stage}/{QUANTIZED_NAME}", total) if start_file else None
    new_path = path.with_name(QUANTIZED_NAME)
    quantized = quantize_weights(tensors, choice.chosen, scheme, new_path, progress)
    floats = _without(path, tensors, choice.chosen)
    graph_options = replace(
        graph_options,
        target=scheme.target,
        quantization=scheme.kind,
        quantized=choice.chosen,
        block_size=scheme.block_size,
        int8_products=scheme.int8_products,
    )
    return StageWeights("copy", {**floats, **quantized}, (new_path, path)), graph_options, choice


def _without(path: Path, tensors: Mapping[str, TensorRange], modules: frozenset[str]) -> dict[str, TensorRange]:
    """Rewrite the file at `path` without the weights of `modules`; returns its tensors."""
    kept = {name: t for name, t in tensors.items() if name.removesuffix(".weight") not in modules}
    plans = {name: TensorPlan(t.dtype, t.shape, (t,)) for name, t in kept.items()}
    partial = path.with_name(f"{path.name}.partial")
    write_safetensors(partial, plans, read_header(path).metadata)
    partial.replace(path)
    return read_header(path).tensors


def summary(choice: QuantizationChoice) -> str:
    """One line: the Linears chosen, the megabytes before and after, and the worst error beside the one tolerated."""
    chosen = [layer for layer in choice.layers if layer.reason is None]
    before = sum(layer.bytes_before for layer in choice.layers) / 1e6
    after = sum(layer.bytes_after for layer in choice.layers) / 1e6
    errors = [(layer.error, layer.tolerated) for layer in chosen if layer.error is not None]
    worst, tolerated = max(errors, default=(0.0, None), key=lambda each: each[0])
    limit = f" of {tolerated:.2%} tolerated" if tolerated is not None else ""
    counted = f"{len(chosen)} of {len(choice.layers)} Linears in {choice.scheme.kind}"
    return f"{counted}, {before:.1f} MB become {after:.1f} MB, worst error {worst:.2%}{limit}"


def table_rows(choice: QuantizationChoice) -> Iterator[tuple[str, ...]]:
    """Rows for a table with the headings COLUMNS: one row for the Linears of the same name in all blocks."""
    groups: dict[str, list[int]] = {}
    for index, layer in enumerate(choice.layers):
        groups.setdefault(re.sub(IN_EVERY_BLOCK, "", layer.module), []).append(index)
    for name, indexes in groups.items():
        layers = [choice.layers[index] for index in indexes]
        errors = [layer.error for layer in layers if layer.error is not None]
        limits = [layer.tolerated for layer in layers if layer.tolerated is not None]
        reasons = [layer.reason for layer in layers if layer.reason is not None]
        yield (
            name,
            f"{len(layers) - len(reasons)} of {len(layers)}",
            f"{median(errors):.2%}" if errors else "",
            f"{max(errors):.2%}" if errors else "",
            f"{max(limits):.2%}" if limits else "",
            f"{sum(layer.bytes_before for layer in layers) / 1e6:.1f}",
            f"{sum(layer.bytes_after for layer in layers) / 1e6:.1f}",
            reasons[0] + (f" (and {len(reasons) - 1} more)" if len(reasons) > 1 and errors else "") if reasons else "",
        )
