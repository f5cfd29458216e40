"""Predicts the files of an export and their sizes, from headers alone."""

import math
from collections.abc import Collection, Iterable
from pathlib import Path

from ...schemas.block_types import nbytes_of
from ...schemas.casts import target_dtype
from ...schemas.folded_biases import BIASES_NAME, folded_biases
from ...schemas.forecast import FileSize, Forecast
from ...schemas.precision import Target
from ...schemas.stages import Stage
from ...storage.file_sizes import sizes_of
from ..checkpoints.component import Component
from .bundle_weights import WEIGHTS_NAME, source_files, stored_dtype, why_not_as_is
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
        dtype = stored_dtype(component, options)
        nbytes = sum(nbytes_of(target_dtype(t.dtype, dtype), math.prod(t.shape)) for t in component.tensors.values())
        writes.append(FileSize(f"{component.stage}/{WEIGHTS_NAME}", nbytes, about=True))
        widths = [folded.width for folded in folded_biases(component.config)]
        if widths and options.target is Target.ORT:
            writes.append(FileSize(f"{component.stage}/{BIASES_NAME}", 4 * sum(widths), about=True))
        if options.quantizes(component.stage):
            notes.append(f"{component.stage}: at most; Linears become smaller where their error is small enough")
        elif options.weights != "copy" and component.stage not in changed and not why_not_as_is(component, dtype):
            unchanged.append(str(component.stage))
    if unchanged:
        how = "hard links" if options.weights == "link" else "clones where the file system has them, else copies"
        notes.append(f"{', '.join(unchanged)}: {how}; links and clones take no disk")
    reads = [path for component in components for path in source_files(component)]
    reads += [Path(path) for path, _ in options.loras]
    return Forecast(output, sizes_of(reads), tuple(writes), notes=tuple(notes))
