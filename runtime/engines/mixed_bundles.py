"""Runs stages of several bundles as one cascade, such as a full prior with a lite decoder."""

from collections.abc import Mapping
from typing import Any

from ...schemas.errors import UsageError
from ...schemas.hoisted import FASTER_IN_PARTS
from ...schemas.manifest import MAIN_GRAPH, Manifest
from ...schemas.stages import Stage
from ...storage.bundle import Bundle
from .protocol import Engine, StageRunner
from .tensorrt.tensorrt_engine import TensorRTEngine


class MixedEngine:
    """An engine that hands some stages to other engines. Those of TensorRT share one budget of GPU memory."""

    def __init__(self, main: Engine, others: Mapping[Stage, Engine]) -> None:
        self.name = main.name
        self.precision = main.precision
        self._main = main
        self._others = others
        self.in_parts = {stage for stage in Stage if stage in getattr(self._of(stage), "in_parts", FASTER_IN_PARTS)}
        with_plans = [engine for engine in (main, *others.values()) if isinstance(engine, TensorRTEngine)]
        for engine in with_plans:
            engine.room = with_plans[0].room

    def graphs(self, stage: Stage) -> tuple[str, ...]:
        return self._of(stage).graphs(stage)

    def load(self, stage: Stage, graph: str = MAIN_GRAPH) -> StageRunner:
        return self._of(stage).load(stage, graph)

    def _of(self, stage: Stage) -> Engine:
        return self._others.get(stage, self._main)


def manifest_with_stages_of(bundle: Bundle, others: Mapping[Stage, Bundle]) -> Manifest:
    """The manifest of `bundle` with the stages of `others` in place of its own.

    Raises UsageError when one of `others` lacks its stage, or the stages take embeddings of different widths."""
    entries = {stage: other.entry(stage) for stage, other in others.items()}
    changes: dict[str, Any] = {"stages": {**bundle.manifest.stages, **entries}}
    if Stage.VQGAN in others:
        changes |= {"vqgan_scale": others[Stage.VQGAN].manifest.vqgan_scale}
    manifest = bundle.manifest.model_copy(update=changes)
    widths = {
        stage: port.dims[2]
        for stage in (Stage.PRIOR, Stage.DECODER)
        if stage in manifest.stages
        for port in manifest.stages[stage].inputs
        if port.name == "clip_text_pooled"
    }
    if len(set(widths.values())) > 1:
        found = ", ".join(f"{stage} takes {width}" for stage, width in widths.items())
        raise UsageError(f"stages of different models: {found} channels of pooled text; take stages that fit together")
    return manifest
