"""Predicts the files of an export and their sizes, from headers alone."""

import math
from collections.abc import Collection, Iterable
from pathlib import Path

from ...schemas.block_types import nbytes_of
from ...schemas.casts import target_dtype
from ...schemas.folded_biases import BIASES_NAME, folded_biases
from ...schemas.forecast import FileSize, Forecast
from ...schemas.precision import Target
from ...schemas.quantization import RULES, Quantization
from ...schemas.stages import Stage
from ...storage.file_sizes import sizes_of
from ..checkpoints.component import Component
from .bundle_weights import WEIGHTS_NAME, source_files
from .export_options import ExportOptions


def forecast_export(
    components: Iterable[Component], output: Path, options: ExportOptions, changed: Collection[Stage]
) -> Forecast:
    """The files that `export` would read and write. `changed` are the stages whose weights LoRAs change.

    The graphs' sizes are known once they are written; they are left out, as are the manifest and the tokenizer."""
    components = tuple(components)
    writes: list[FileSize] = []
    notes = ["graphs are not counted: some megabytes a stage"]
    unchanged: list[str] = []
    for component in components:
        quantized = options.quantize is not Quantization.NONE and component.stage in RULES
        shared = options.weights != "copy" and not quantized and component.stage not in changed
        nbytes = _bytes(component, _stored_as(component, options))
        writes.append(FileSize(f"{component.stage}/{WEIGHTS_NAME}", nbytes, about=True))
        widths = [folded.width for folded in folded_biases(component.config)]
        if widths and options.target is Target.ORT:
            writes.append(FileSize(f"{component.stage}/{BIASES_NAME}", 4 * sum(widths), about=True))
        if quantized:
            notes.append(f"{component.stage}: at most; Linears become smaller where their error is small enough")
        elif shared and nbytes == _bytes(component, None):
            unchanged.append(str(component.stage))
    if unchanged:
        how = "hard links" if options.weights == "link" else "clones where the file system has them, else copies"
        notes.append(f"{', '.join(unchanged)}: {how}; links and clones take no disk")
    reads = [path for component in components for path in source_files(component)]
    reads += [Path(path) for path, _ in options.loras]
    return Forecast(output, sizes_of(reads), tuple(writes), notes=tuple(notes))


def _bytes(component: Component, dtype: str | None) -> int:
    """Bytes of the weights once they are stored as `dtype`; None keeps each tensor's own."""
    return sum(
        nbytes_of(target_dtype(tensor.dtype, dtype), math.prod(tensor.shape)) for tensor in component.tensors.values()
    )


def _stored_as(component: Component, options: ExportOptions) -> str | None:
    """The dtype that the weights are stored in; hard links keep the model's."""
    is_linked = options.weights == "link" and options.storage is None
    return None if is_linked else options.storage_of(component.stage)
