"""Exports a model as a bundle that GPU engines can be built from."""

from pathlib import Path

from ...schemas.callbacks import Say, StartFile, ignored
from ...schemas.forecast import OnPlan
from ...schemas.manifest import Manifest
from ...schemas.precision import Precision, Target
from ...schemas.stages import Stage
from ...schemas.targets import ALONE, AOTINDUCTOR
from ..export.export import export
from ..export.export_options import ExportOptions, Fp16Safe
from .builder import require_machine
from .plans_to_build import BuildOptions, require_targets


def export_for_build(
    model: str | Path,
    output: str | Path,
    options: BuildOptions,
    *,
    precision: Precision | None = None,
    text_encoder: str | Path | None = None,
    start_file: StartFile | None = None,
    say: Say = ignored,
    on_plan: OnPlan | None = None,
) -> Manifest:
    """Export the stages of `options` from `model` to the bundle `output`, for TensorRT or AOTInductor.

    Without `precision` the graphs compute in bf16, or in fp16 when sm75 is among the targets, which has no bf16. For
    AOTInductor on the CPU they compute in fp32. A prior in fp16 for TensorRT is exported with ``fp16_safe="auto"``.

    Raises UsageError, before anything is written, for targets that cannot run graphs of that precision, and EngineError
    without TensorRT."""
    packages = options.backend == AOTINDUCTOR
    usual = Precision.FP32 if packages and options.device == "cpu" else Precision.BF16
    computed = precision or (Precision.FP16 if ALONE in options.targets else usual)
    require_targets(options, computed)
    if not packages:
        require_machine(options)
    measured = not packages and computed is Precision.FP16 and Stage.PRIOR in (options.stages or (Stage.PRIOR,))
    safe: Fp16Safe = "auto" if measured else None
    wanted = ExportOptions(
        stages=options.stages,
        precision=computed,
        target=Target.PORTABLE if packages else Target.TENSORRT,
        fp16_safe=safe,
        text_encoder=text_encoder,
        force=options.force,
    )
    return export(model, output, wanted, start_file=start_file, say=say, on_plan=on_plan)
