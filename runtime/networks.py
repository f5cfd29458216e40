"""The networks of a bundle on one engine: loads them when needed, runs them, and checks their outputs.

A prior that overflows in fp16 outputs NaN, which the VQGAN turns into a black image. The check here raises
UnsoundError instead.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.errors import EngineError, UnsoundError, UsageError
from ..schemas.manifest import MAIN_GRAPH, Manifest, StageEntry
from ..schemas.precision import Precision
from ..schemas.stages import Stage
from .engines.protocol import Engine, Run, StageRunner, Tensors
from .memory.prediction import loaded_bytes
from .memory.residency import RESIDENT, MemoryPolicy, Residency
from .timings import Timings

SAFE_STAGES = (Stage.PRIOR, Stage.DECODER)  # the stages for which export has --fp16-safe
EXPORT = "export it again: cascadekit export MODEL -o BUNDLE --precision"
DAMAGED = (
    "compare its files with the manifest (cascadekit validate --hash BUNDLE), "
    "and its numbers with the model (cascadekit verify BUNDLE --against MODEL)"
)


class Networks:
    """The networks of one bundle's stages on one engine."""

    def __init__(
        self, engine: Engine, manifest: Manifest, memory: MemoryPolicy = RESIDENT, *, checked: bool = True
    ) -> None:
        """`memory` decides which stages stay loaded. `checked=False` lets NaN, infinity and constant images pass."""
        self.engine = engine
        self.manifest = manifest
        self.checked = checked
        self.timings = Timings()
        self.residency = Residency(engine, memory, partial(loaded_bytes, manifest))

    @contextmanager
    def load(self, stage: Stage, graph: str = MAIN_GRAPH) -> Iterator[StageRunner]:
        """The stage's runner, in memory for as long as the context lasts; its outputs are not checked."""
        began = perf_counter()
        with self.residency.use(stage, graph) as runner:
            self.timings.loaded(stage, perf_counter() - began)
            with self.timings.running(stage):
                yield runner

    @contextmanager
    def use(self, stage: Stage, graph: str = MAIN_GRAPH) -> Iterator[Run]:
        """The stage as a function of its input ports, in memory for as long as the context lasts.

        The function raises UnsoundError when an output holds NaN or infinity."""
        with self.load(stage, graph) as runner:

            def run(inputs: Tensors) -> dict[str, NDArray[Any]]:
                outputs = runner(inputs)
                for name, value in outputs.items():
                    self.require_sound(stage, value, name, varied=False)
                return outputs

            yield run

    def require_sound(
        self, stage: Stage, rows: NDArray[Any], where: str, *, images: int = 0, varied: bool = True
    ) -> None:
        """Raise UnsoundError when a row of the batch (B, ...) holds NaN or infinity, or, with `varied`, one value only.

        The message names the stage, what was computed (`where`), the images concerned, and the remedy for the precision
        of the stage. Row `n` belongs to image `n` modulo `images`. Nothing is raised where checks are off."""
        if not self.checked or not rows.size:
            return
        flat = rows.reshape(len(rows), -1)
        with np.errstate(invalid="ignore"):
            low, high = flat.min(axis=1), flat.max(axis=1)  # NaN where a row holds any
        infinite = ~(np.isfinite(low) & np.isfinite(high))
        constant = (low == high) & varied & (flat.shape[1] > 1)
        if not (infinite | constant).any():
            return
        kind = infinite if infinite.any() else constant
        found = "NaN or infinity" if infinite.any() else f"{low[np.argmax(constant)]:g} in every place"
        bad = tuple(sorted({int(row) % images for row in np.flatnonzero(kind)})) if images else ()
        of = f" for image {', '.join(str(number + 1) for number in bad)} of {images}" if images > 1 else ""
        remedy = advice(stage, self.manifest.stages.get(stage))
        raise UnsoundError(f"{stage}{where and ', ' + where}: gave {found}{of}; {remedy}", bad)

    def size_of(self, stage: Stage, port: str, axis: int = 1) -> int:
        """The fixed size of an axis of an input port.

        Raises EngineError when the bundle has no such stage or port, or the axis has no fixed size."""
        entry = self.manifest.stages.get(stage)
        dims = next((p.dims for p in entry.inputs if p.name == port), ()) if entry else ()
        if axis >= len(dims) or not isinstance(size := dims[axis], int):
            raise EngineError(f"the bundle has no {stage} with an input {port}; export the model again")
        return size


def require_finite(what: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Raise UsageError, which names the array, when one of the user's arrays holds NaN or infinity."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UsageError(f"{what} {name}: expected finite numbers, found NaN or infinity; check its source")


def advice(stage: Stage, entry: StageEntry | None) -> str:
    """The remedy for a stage whose output is not finite; it depends on the precision of the stage."""
    if entry is None or entry.precision is not Precision.FP16:
        return DAMAGED
    wider = f"{stage}=bf16 or {stage}=fp32"
    if stage not in SAFE_STAGES:
        return f"fp16 ends at 65504: {EXPORT} {wider}"
    safe = f"--fp16-safe {max(entry.exponents.values()) + 2}" if entry.exponents else "--fp16-safe auto"
    return f"fp16 ends at 65504: {EXPORT} {stage}=fp16 {safe}, or in place of fp16 {wider}"
