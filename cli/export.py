"""The command `export`."""

from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, get_args

import click

from ..converters.export.export_options import WeightsMode
from ..schemas.errors import UsageError
from ..schemas.fp16 import MAX_EXPONENT
from ..schemas.precision import Precision, Target
from ..schemas.quantization import Quantization
from ..schemas.stages import Stage
from .console import Volume, detail, finish, note, say, show_table, volume
from .dry_run import plan_only
from .help import HelpfulCommand
from .options import AS_JSON, DRY_RUN, PATH, STAGES, WEIGHTS, choice_option, parse_lora, parsed, volume_options
from .progress import byte_progress

if TYPE_CHECKING:
    from ..converters.export.quantize_choice import QuantizationChoice


def _stage_and_precision(text: str) -> tuple[Stage | None, Precision]:
    """The parts of [STAGE=]PRECISION; without a stage it is for all other stages."""
    stage, _, precision = text.rpartition("=")
    try:
        return Stage(stage) if stage else None, Precision(precision)
    except ValueError:
        raise UsageError(
            f"{text!r}: expected {', '.join(Precision)}, or a stage and one of these as in prior=bf16"
        ) from None


def _fp16_safe(text: str) -> str | int:
    if text in ("auto", "off"):
        return text
    if not text.isdecimal() or len(text) > 2 or int(text) > MAX_EXPONENT:
        raise UsageError(f"{text!r}: expected auto, off, or a number from 0 to {MAX_EXPONENT}")
    return int(text)


@click.command(cls=HelpfulCommand)
@click.argument("model", type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="Bundle folder to make.")
@click.option("--stage", "stages", multiple=True, type=STAGES, help="Export this stage only (repeatable).")
@choice_option(
    "--weights",
    list(get_args(WeightsMode)),
    "auto: clones of the model's files where the file system has them (Btrfs, XFS), else copies. copy: copies. "
    "link: hard links, which take no disk. No other program can open the graphs then (onnx.load refuses hard links), "
    "and the model's files must not change in place (replacing or deleting them is fine).",
    default="auto",
)
@click.option(
    "--precision",
    "precisions",
    metavar="[STAGE=]fp32|bf16|fp16",
    multiple=True,
    callback=parsed(_stage_and_precision),
    help="Precision that graphs compute in, all or those of one stage (repeatable).  [default: fp32]",
)
@choice_option(
    "--target",
    Target,
    "Operators to use: those of any runtime, ONNX Runtime's own as well, or those that suit TensorRT (opset 23).",
    default=Target.PORTABLE.value,
)
@click.option(
    "--storage",
    type=click.Choice([precision.value for precision in Precision]),
    help="Precision of the stored weights.  [default: unchanged for fp32, else that of the graph]",
)
@click.option(
    "--fp16-safe",
    metavar="auto|off|K",
    callback=parsed(_fp16_safe),
    help="Keep the sums of prior, decoder and vqgan within the range of fp16: scaled by 2^-K, or (auto) by the scale "
    "that a short calibration run finds necessary.  [default: auto]",
)
@click.option(
    "--calibration",
    type=PATH,
    help="File with the values of a calibration run: used if it exists, else written. It is for the same weights only.",
)
@choice_option(
    "--quantize",
    Quantization,
    "Store Linears of prior, decoder and text encoder in 8 or 4 bits, where the error is small enough.",
    default="none",
)
@click.option(
    "--quantize-threshold",
    type=click.FloatRange(min=0, min_open=True),
    help="Relative error up to which a Linear is quantised.  [default: twice that of normal numbers]",
)
@click.option("--controlnet", is_flag=True, help="Give the prior inputs for a ControlNet's residuals.")
@click.option(
    "--hash/--no-hash",
    default=True,
    help="Record the SHA-256 of weights, which takes up to 0.7 s a gigabyte; `validate --hash` compares with it.  "
    "[default: --hash]",
)
@click.option(
    "--lora",
    "loras",
    metavar="FILE[:STRENGTH]",
    multiple=True,
    callback=parsed(parse_lora),
    help="Merge a LoRA into the weights (repeatable); the changed weights are copied.",
)
@click.option("--text-encoder", type=PATH, help="CLIP bigG text encoder, when MODEL has none.")
@click.option("--vqgan-scale", type=float, help="Latent scale of the vqgan (diffusers 0.3764, original 0.43).")
@click.option("--force", is_flag=True, help="Replace an existing bundle; other files stay.")
@DRY_RUN
@AS_JSON
@volume_options
def export(
    model: Path,
    output: Path,
    precisions: tuple[tuple[Stage | None, Precision], ...],
    dry_run: bool,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Write a model as ONNX graphs and safetensors weights.

    Each stage becomes a graph; its weights lie in safetensors files beside it.

    Example: cascadekit export model -o bundle
    """
    from ..converters.export.export import export as run
    from ..converters.export.export_options import ExportOptions

    start = perf_counter()
    by_stage = dict(precisions)
    options = ExportOptions(
        precision=by_stage.pop(None, Precision.FP32),
        precisions={stage: precision for stage, precision in by_stage.items() if stage},
        **chosen,
    )
    choices: dict[Stage, QuantizationChoice] = {}
    with plan_only(dry_run, as_json=as_json) as on_plan, byte_progress() as start_file:
        manifest = run(
            model, output, options, start_file=start_file, say=note, on_quantized=choices.__setitem__, on_plan=on_plan
        )
    if not as_json:
        _show_choices(choices)
    for stage, entry in manifest.stages.items():
        size = sum(file.bytes for file in entry.files) / 1e6
        detail(f"{stage}: {entry.precision}, graphs {', '.join(entry.graphs)}, {len(entry.files)} files, {size:.1f} MB")
    weights = ", ".join(f"{stage}: {WEIGHTS[entry.weights]}" for stage, entry in manifest.stages.items())
    line = f"wrote {output} ({weights}; {perf_counter() - start:.1f} s)"
    finish(line, {"output": str(output), **manifest.model_dump(mode="json")}, as_json=as_json)
    if any(entry.weights == "link" for entry in manifest.stages.values()):
        note(
            "hard links: other programs cannot open the graphs (onnx.load refuses them), and the model's files must "
            "not change in place; --weights copy makes the bundle independent"
        )


def _show_choices(choices: "Mapping[Stage, QuantizationChoice]") -> None:
    """Print which Linears were quantised: a line for each stage, or with --verbose a table of its Linears."""
    from ..converters.export.quantize_stage import COLUMNS, summary, table_rows

    for stage, choice in choices.items():
        if volume() is Volume.VERBOSE:
            show_table(f"{stage} in {choice.scheme.kind}", COLUMNS, table_rows(choice))
        else:
            say(f"{stage}: {summary(choice)}")
