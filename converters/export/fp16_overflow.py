"""Estimates from the weights alone how large the streams of a prior or decoder grow.

A residual block adds the output of its last layer to its stream. For inputs of unit variance that output is as large
as a row of the layer's weights is long, plus the bias. Inputs may be larger, so a sum that fits into fp16 proves
nothing. A sum that does not fit is a reason to measure.
"""

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ...schemas.fp16 import MARGIN_BITS
from ...schemas.precision import FP16_MAX
from ...storage.safetensors_reader import TensorRange

LAST_LAYERS = (".channelwise.4.", ".to_out.0.")  # of perceptrons and attention
ROWS = 64  # rows that are read of each layer, evenly spaced: some MB of a prior of 14 GB
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def largest_stream(tensors: Mapping[str, TensorRange]) -> tuple[str, float]:
    """The stream ("up_blocks.1") that grows most over all its blocks, and its size at the end."""
    grown: dict[str, float] = defaultdict(float)
    for name, tensor in tensors.items():
        if any(part in name for part in LAST_LAYERS) and tensor.dtype in DTYPES:
            rows = _rows(tensor)
            grown[".".join(name.split(".")[:2])] += float(np.sqrt((rows * rows).sum(axis=1)).max())
    return max(grown.items(), key=lambda item: item[1], default=("", 0.0))


def overflow_warning(stage: str, tensors: Mapping[str, TensorRange]) -> str:
    """A line for the user about a stage that is exported in fp16 without measured exponents."""
    stream, size = largest_stream(tensors)
    advice = 'fp16_safe="auto" measures and prevents it; bf16 has no such limit'
    if not size * 2**MARGIN_BITS <= FP16_MAX:  # NaN too
        return f"{stage} in fp16: by its weights {stream} reaches about {size:.2g}, beyond fp16's 65504; {advice}"
    return f"{stage} in fp16: how large its values grow was not measured, and may go beyond 65504; {advice}"


def _rows(tensor: TensorRange) -> NDArray[np.float32]:
    """Up to ROWS slices along the first dimension of `tensor`, each flattened to a row."""
    count = tensor.shape[0]
    values = np.memmap(tensor.path, np.uint8, "r", tensor.offset, (tensor.nbytes,))
    table = values.view(DTYPES[tensor.dtype]).reshape(count, -1)
    chosen = table[np.unique(np.linspace(0, count - 1, min(count, ROWS)).astype(int))]
    if tensor.dtype == "BF16":
        chosen = (chosen.astype("<u4") << 16).view(np.float32)
    rows: NDArray[np.float32] = np.asarray(chosen, np.float32)
    return rows
