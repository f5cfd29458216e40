"""Estimates from the weights alone how large the streams of a prior or decoder grow.

A residual block adds the output of its last layer to its stream. For inputs of unit variance that output is as large
as a row of the layer's weights is long, plus the bias. Inputs may be larger, so a sum that fits into fp16 proves
nothing. A sum that does not fit is a reason to measure.
"""

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from ...schemas.dtypes import FLOATS
from ...schemas.fp16 import MARGIN_BITS
from ...schemas.precision import FP16_MAX
from ...storage.float_rows import float_rows
from ...storage.safetensors_reader import TensorRange

LAST_LAYERS = (".channelwise.4.", ".to_out.0.")  # of perceptrons and attention
ROWS = 64  # rows that are read of each layer, evenly spaced: some MB of a prior of 14 GB


def largest_stream(tensors: Mapping[str, TensorRange]) -> tuple[str, float]:
    """The stream ("up_blocks.1") that grows most over all its blocks, and its size at the end."""
    grown: dict[str, float] = defaultdict(float)
    for name, tensor in tensors.items():
        if any(part in name for part in LAST_LAYERS) and tensor.dtype in FLOATS:
            rows = np.concatenate([*float_rows(tensor, 1, step=-(-tensor.shape[0] // ROWS))])
            grown[".".join(name.split(".")[:2])] += float(np.sqrt((rows * rows).sum(axis=1)).max())
    return max(grown.items(), key=lambda item: item[1], default=("", 0.0))


def overflow_warning(stage: str, tensors: Mapping[str, TensorRange]) -> str:
    """A line for the user about a stage that is exported in fp16 without measured exponents."""
    stream, size = largest_stream(tensors)
    advice = 'fp16_safe="auto" measures and prevents it; bf16 has no such limit'
    if not size * 2**MARGIN_BITS <= FP16_MAX:  # NaN too
        return f"{stage} in fp16: by its weights {stream} reaches about {size:.2g}, beyond fp16's 65504; {advice}"
    return f"{stage} in fp16: how large its values grow was not measured, and may go beyond 65504; {advice}"
