"""Writes quantised weights from ranges of safetensors files into one of their own, some rows at a time."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np

from ...schemas.callbacks import Progress
from ...schemas.errors import ConversionError
from ...schemas.quantization import Quantization, Scheme, StoredTensor, quantized_name, scale_name, stored_tensors
from ...storage.float_rows import float_rows
from ...storage.safetensors_reader import TensorRange, read_header
from ...storage.safetensors_writer import NewSafetensors, new_safetensors
from .quantize_values import Floats, Quantized, pack, quantize

BLOCK_VALUES = 1 << 21  # values of a block of rows; about ten arrays of that size are in memory at a time


def quantize_weights(
    tensors: Mapping[str, TensorRange],
    chosen: Collection[str],
    scheme: Scheme,
    path: Path,
    progress: Progress | None = None,
) -> dict[str, TensorRange]:
    """Write the weights of the modules `chosen`, out of the float `tensors`, in `scheme` to a safetensors file.

    Returns the range of each stored tensor in the file (see ``schemas.quantization.stored_tensors``). The file is on
    disk (fsync) when this returns. It takes about 100 MB of memory for matrices of any size, unless a row has over 2
    million values. `progress` counts bytes of the output's tensors.

    Raises ConversionError for NaN and infinities, when the disk is full and when a source cannot be read; the caller
    then removes the file."""
    matrices = {module: tensors[f"{module}.weight"] for module in sorted(chosen)}
    flat: dict[str, StoredTensor] = {}
    for module, part in matrices.items():
        flat |= stored_tensors(scheme, module, *part.shape[:2])
    with new_safetensors(path, flat, {"format": "pt"}) as out:
        for module, matrix in matrices.items():
            _write_module(module, matrix, scheme, out, progress)
    return read_header(path).tensors


def row_blocks(part: TensorRange) -> Iterator[Floats]:
    """The values (n, columns) float32 of each block of rows."""
    return float_rows(part, max(1, BLOCK_VALUES // part.shape[1]))


def quantize_rows(module: str, part: TensorRange, rows: Floats, scheme: Scheme) -> Quantized:
    """`quantize` some rows of the weight of `module`, which is stored at `part`; an error names both."""
    try:
        return quantize(rows, scheme)
    except ConversionError as error:
        raise ConversionError(f"{part.path}: {module}.weight {error}") from error


def _write_module(
    module: str, part: TensorRange, scheme: Scheme, out: NewSafetensors, progress: Progress | None
) -> None:
    """Write the values and the scales of one module, a block of rows after the other."""
    described = stored_tensors(scheme, module, *part.shape[:2])
    values, scale = described[quantized_name(module)], described[scale_name(module)]
    start = 0
    for rows in row_blocks(part):
        quantized = quantize_rows(module, part, rows, scheme)
        packed = pack(quantized, scheme)
        if scheme.kind is Quantization.INT8_DYNAMIC:  # stored transposed: the values of a column are adjacent
            out.write_lines(quantized_name(module), packed, start, values.shape[1])
        else:
            out.write(quantized_name(module), packed, start * (values.nbytes // values.shape[0]))
        little = np.ascontiguousarray(quantized.scale, "<f4")
        out.write(scale_name(module), little, start * (scale.nbytes // scale.shape[0]))
        start += len(rows)
        if progress:
            progress(packed.nbytes + little.nbytes)
