"""How large a prior's or decoder's streams may grow, by its weights alone: a hint where nothing was measured.

A residual block adds to its stream what its last layer makes of values inside. For values of unit variance that is the
length of a row of the layer's weights, plus its bias. Values inside may well be larger, so a sum that fits into fp16
proves nothing; one that does not is a reason to measure.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...schemas.fp16 import MARGIN_BITS
from ...schemas.precision import FP16_MAX
from ..onnx import Weight

LAST_LAYERS = (".channelwise.4.", ".to_out.0.")  # of perceptrons and attention
ROWS = 64  # read of each layer, evenly spaced: some MB of a prior of 14 GB
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def largest_stream(weights: Mapping[str, Weight], folder: Path) -> tuple[str, float]:
    """The stream ("up_blocks.1") that grows most, and how far, over all its blocks. `weights` lie in `folder`."""
    grown: dict[str, float] = defaultdict(float)
    for name, weight in weights.items():
        if any(part in name for part in LAST_LAYERS) and weight.dtype in DTYPES:
            rows = _rows(weight, folder)
            grown[".".join(name.split(".")[:2])] += float(np.sqrt((rows * rows).sum(axis=1)).max())
    return max(grown.items(), key=lambda item: item[1], default=("", 0.0))


def warning(stage: str, weights: Mapping[str, Weight], folder: Path) -> str:
    """A line about a stage that is exported in fp16 without a plan."""
    stream, size = largest_stream(weights, folder)
    todo = "--fp16-safe auto measures and prevents it, bf16 has no such end"
    if not size * 2**MARGIN_BITS <= FP16_MAX:  # NaN too
        return f"{stage} in fp16: by its weights {stream} reaches about {size:.2g}, beyond fp16's 65504: {todo}"
    return f"{stage} in fp16: how large its values grow was not measured, and may go beyond 65504: {todo}"


def _rows(weight: Weight, folder: Path) -> NDArray[np.float32]:
    """Up to ROWS of its first dimension, each as one row."""
    count = weight.shape[0]
    values = np.memmap(folder / weight.location, np.uint8, "r", weight.offset, (weight.length,))
    table = values.view(DTYPES[weight.dtype]).reshape(count, -1)
    chosen = table[np.unique(np.linspace(0, count - 1, min(count, ROWS)).astype(int))]
    if weight.dtype == "BF16":
        chosen = (chosen.astype("<u4") << 16).view(np.float32)
    rows: NDArray[np.float32] = np.asarray(chosen, np.float32)
    return rows
