"""Quantises a stage that is being exported: its float weights lie in the stage's folder, and leave it."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from ...schemas.callbacks import Progress
from ...schemas.errors import UsageError
from ...schemas.precision import Target
from ...schemas.quantization import BUNDLE_BLOCKS, RULES, Quantization, Scheme
from ...schemas.stages import NetworkConfig, Stage
from ...storage.safetensors_plan import TensorPlan
from ...storage.safetensors_reader import TensorRange, read_header
from ...storage.safetensors_writer import write_safetensors
from ..onnx import GraphOptions
from .quantize_choice import Choice, choose_layers
from .quantize_file import quantize_weights

QUANTIZED_NAME = "quantized.safetensors"
COLUMNS = ("Linear", "quantised", "error (median)", "error (worst)", "tolerated", "MB before", "MB after", "in float")

IN_EVERY_BLOCK = r"^\w+_blocks\.\d+\.\d+\.|^.*\.layers\.\d+\."

# What bundles are quantised for. ONNX Runtime's CPU kernels are faster than in fp32 with integer activations only.
# fp8 uses standard operators that ONNX Runtime runs and TensorRT compiles.
SCHEMES: Mapping[Quantization, Scheme] = {
    **{kind: Scheme(kind, Target.ORT, block_size=size, int8_products=True) for kind, size in BUNDLE_BLOCKS.items()},
    Quantization.INT8_DYNAMIC: Scheme(Quantization.INT8_DYNAMIC, Target.ORT),
    Quantization.FP8: Scheme(Quantization.FP8, Target.PORTABLE),
}

StartFile = Callable[[str, int], Progress]
OnChoice = Callable[[Stage, Choice], object]


@dataclass(frozen=True)
class Quantize:
    """How the stages of an export are to be quantised; see ``quantize_choice.choose_layers`` for `threshold`.
    `on_choice` is told what was measured and chosen for each."""

    kind: Quantization
    threshold: float | None = None
    on_choice: OnChoice = lambda stage, choice: None

    def __post_init__(self) -> None:
        if self.kind not in SCHEMES:
            raise UsageError(f"quantize {self.kind}: expected one of {', '.join(SCHEMES)}")


@dataclass(frozen=True)
class QuantizedStage:
    """Where all tensors of a stage lie now, and what its graph is to be written with."""

    tensors: dict[str, TensorRange]
    options: GraphOptions


def scheme_for(kind: Quantization, target: Target) -> Scheme:
    """How `kind` is done for `target`; for the portable one, which nobody has to ask for, as SCHEMES says."""
    scheme = SCHEMES[kind]
    if target is Target.PORTABLE:
        return scheme
    return replace(scheme, target=target, int8_products=scheme.int8_products and target is Target.ORT)


def quantize_stage(
    config: NetworkConfig,
    tensors: Mapping[str, TensorRange],
    wish: Quantize,
    options: GraphOptions,
    start_file: StartFile | None = None,
) -> QuantizedStage:
    """Quantise what can bear it of the weights `tensors`, all in one file that belongs to the bundle: beside it comes
    a second one, and it is written anew without what is there. Networks without Linears stay as they are. `options`
    are those of the float graphs.

    Raises ExportError when the weights cannot be used, ConversionError when they cannot be read or written."""
    scheme = scheme_for(wish.kind, options.target)
    if config.stage not in RULES:
        return QuantizedStage(dict(tensors), options)
    choice = choose_layers(config, tensors, scheme, threshold=wish.threshold)
    wish.on_choice(config.stage, choice)
    if not choice.chosen:
        return QuantizedStage(dict(tensors), options)
    (path,) = {tensor.path for tensor in tensors.values()}
    label = f"{config.stage}/{QUANTIZED_NAME}"
    total = sum(layer.bytes_after for layer in choice.layers if layer.reason is None)
    progress = start_file(label, total) if start_file else None
    quantized = quantize_weights(tensors, choice.chosen, scheme, path.with_name(QUANTIZED_NAME), progress)
    floats = _without(path, tensors, choice.chosen)
    options = replace(
        options,
        target=scheme.target,
        quantization=scheme.kind,
        quantized=choice.chosen,
        block_size=scheme.block_size,
        int8_products=scheme.int8_products,
    )
    return QuantizedStage({**floats, **quantized}, options)


def _without(path: Path, tensors: Mapping[str, TensorRange], modules: frozenset[str]) -> dict[str, TensorRange]:
    """Write the file at `path` anew without the weights of `modules`."""
    kept = {name: t for name, t in tensors.items() if name.removesuffix(".weight") not in modules}
    plans = {name: TensorPlan(t.dtype, t.shape, (replace(t, transposed=False),)) for name, t in kept.items()}
    partial = path.with_name(f"{path.name}.partial")
    write_safetensors(partial, plans, read_header(path).metadata)
    partial.replace(path)
    return read_header(path).tensors


def table_rows(choice: Choice) -> Iterator[tuple[str, ...]]:
    """What was chosen and measured, a row for Linears of the same name in all blocks; cells as in COLUMNS."""
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
