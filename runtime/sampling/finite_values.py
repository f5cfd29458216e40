"""Whether what a network gave can belong to an image: finite numbers, and not one value throughout.

A prior that overflows in fp16 gives NaN, of which the VQGAN makes a black image; this is where that ends instead.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...schemas.bundle import StageEntry
from ...schemas.errors import UnsoundError, UsageError
from ...schemas.precision import Precision
from ...schemas.stages import Stage

SAFE_STAGES = (Stage.PRIOR, Stage.DECODER)  # for which export has --fp16-safe
DAMAGED = "compare its files with cascadekit validate --hash, its numbers with cascadekit verify BUNDLE --against MODEL"


def require_sound(
    stage: Stage, entry: StageEntry | None, rows: NDArray[Any], where: str = "", *, images: int = 0, varied: bool = True
) -> None:
    """Raise UnsoundError when a row of the batch holds NaN or infinity, or, with `varied`, one value throughout.

    The message names `stage`, what it was doing (`where`), which of `images` images it is about (row `n` belongs to
    image `n` modulo their number) and, by the stage's `entry`, what to do. Two passes over the values."""
    if not rows.size:
        return
    flat = rows.reshape(len(rows), -1)
    with np.errstate(invalid="ignore"):
        low, high = flat.min(axis=1), flat.max(axis=1)  # NaN wherever there is one
    infinite = ~(np.isfinite(low) & np.isfinite(high))
    constant = (low == high) & varied & (flat.shape[1] > 1)
    if not (infinite | constant).any():
        return
    kind = infinite if infinite.any() else constant
    found = "NaN or infinity" if infinite.any() else f"{low[np.argmax(constant)]:g} in every place"
    bad = tuple(sorted({int(row) % images for row in np.flatnonzero(kind)})) if images else ()
    of = f" for image {', '.join(str(number + 1) for number in bad)} of {images}" if images > 1 else ""
    raise UnsoundError(f"{stage}{where and ', ' + where}: gave {found}{of}; {advice(stage, entry)}", bad)


def require_finite(what: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Raise UsageError that names the array, one that was given and not computed, which holds NaN or infinity."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UsageError(f"{what} {name}: expected finite numbers, found NaN or infinity; see where they came from")


def advice(stage: Stage, entry: StageEntry | None) -> str:
    """What to do about a stage that gives no numbers, by what it computes in."""
    if entry is None or entry.precision is not Precision.FP16:
        return DAMAGED
    wider = f"{stage}=bf16 or {stage}=fp32"
    if stage not in SAFE_STAGES:
        return f"fp16 ends at 65504: export it again with --precision {wider}"
    safe = f"--fp16-safe {max(entry.exponents.values()) + 2}" if entry.exponents else "--fp16-safe auto"
    return f"fp16 ends at 65504: export it again with --precision {stage}=fp16 {safe}, or --precision {wider}"
