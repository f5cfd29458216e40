"""The command `build`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..schemas.errors import UsageError
from ..schemas.precision import Precision
from ..schemas.stages import Stage
from ..schemas.targets import AOTINDUCTOR, PLAIN, RTX, parse_targets
from .build_options import chosen_profiles, parse_image_size, parse_profile, size_option
from .console import detail, note, say_json, show_table
from .dry_run import plan_only
from .help import HelpfulCommand
from .options import AS_JSON, DRY_RUN, PATH, STAGES, choice_option, parsed, volume_options
from .progress import build_progress, byte_progress

if TYPE_CHECKING:
    from ..converters.tensorrt import Built
    from ..schemas.plan_entries import ImageSize
    from ..schemas.profiles import Bounds

COLUMNS = ("stage", "graph", "for", "precision", "MB", "seconds", "peak MB", "plan", "")
HOWS = {"built": "built", "kept": "was there", "cached": "from the cache"}


@click.command(cls=HelpfulCommand)
@click.argument("bundle", type=PATH)
@choice_option(
    "--backend",
    [RTX, PLAIN, AOTINDUCTOR],
    "tensorrt-rtx needs no GPU and builds for those of --arch; tensorrt builds for the GPU of this machine, "
    "aotinductor for its --device.",
    default=RTX,
)
@choice_option("--device", ["cpu", "cuda"], "Device of this machine to build for (aotinductor only).", default="cpu")
@click.option(
    "--arch",
    "targets",
    metavar="GPU",
    multiple=True,
    help="GPU to build for, such as sm89 or 'rtx 4090' (repeatable, or with commas); one plan serves several.",
)
@click.option("--stage", "stages", multiple=True, type=STAGES, help="Build this stage only (repeatable).")
@click.option(
    "--graph",
    "graphs",
    multiple=True,
    help="Build graphs of this name, such as model or encoder (repeatable).  [default: the graphs that generate runs]",
)
@size_option("min", "Smallest images: width x height x images at a time (1 when left out).")
@size_option("opt", "Likeliest images; these run fastest.")
@size_option("max", "Largest images.")
@click.option(
    "--static",
    "statics",
    metavar="WxH[xB]",
    multiple=True,
    callback=parsed(parse_image_size),
    help="Add a profile for this size alone (repeatable).",
)
@click.option(
    "--profile",
    "profiles",
    metavar="MIN:OPT:MAX",
    multiple=True,
    callback=parsed(parse_profile),
    help="Add a profile (repeatable). Several narrow profiles run faster than a wide one.",
)
@click.option("-o", "--output", type=PATH, help="Export first: BUNDLE is then a model, and this is the bundle to make.")
@click.option(
    "--precision",
    type=click.Choice([precision.value for precision in Precision]),
    help="Precision of the export of -o.  [default: bf16, fp16 for sm75]",
)
@click.option("--text-encoder", type=PATH, help="CLIP bigG text encoder for the export of -o, when the model has none.")
@click.option("--refittable", is_flag=True, help="Build engines that can take a LoRA's weights later (tensorrt only).")
@click.option("--weight-streaming", is_flag=True, help="Build plans whose weights may stay in the host's memory.")
@click.option("--cache", type=PATH, help="Folder of plans that bundles share.")
@click.option("--prune", "pruned", is_flag=True, help="Remove plans of earlier weights of the bundle.")
@click.option(
    "--memory-check/--no-memory-check",
    "check_memory",
    default=True,
    help="Refuse a build that needs more memory than is free, or start it.  [default: --memory-check]",
)
@click.option("--force", is_flag=True, help="Build existing plans again; replace the bundle of -o.")
@DRY_RUN
@AS_JSON
@volume_options
def build(
    bundle: Path,
    targets: tuple[str, ...],
    min_size: "ImageSize | None",
    opt_size: "ImageSize | None",
    max_size: "ImageSize | None",
    statics: "tuple[ImageSize, ...]",
    profiles: "tuple[Bounds, ...]",
    stages: tuple[str, ...],
    output: Path | None,
    precision: str | None,
    text_encoder: Path | None,
    pruned: bool,
    dry_run: bool,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Build GPU engines of a bundle's graphs.

    With tensorrt-rtx, any machine builds for any GPU.

    Example: cascadekit build bundle --arch sm89 --arch "rtx 5090"
    From original files to engines: cascadekit build model -o bundle --arch sm89
    """
    from ..converters.tensorrt import BuildOptions, prune
    from ..converters.tensorrt import build as run

    options = BuildOptions(
        targets=parse_targets(targets),
        stages=tuple(Stage(stage) for stage in stages),
        profiles=chosen_profiles(min_size, opt_size, max_size, statics=statics, profiles=profiles),
        **chosen,
    )
    if output is not None:
        from ..converters.tensorrt.export_for_build import export_for_build

        export: dict[str, Any] = {"precision": precision and Precision(precision), "text_encoder": text_encoder}
        with plan_only(dry_run, as_json=as_json) as on_plan, byte_progress() as start_file:
            export_for_build(bundle, output, options, **export, start_file=start_file, say=note, on_plan=on_plan)
        bundle = output
    elif precision or text_encoder:
        raise UsageError("--precision and --text-encoder are for the export that -o asks for")
    with plan_only(dry_run, as_json=as_json) as on_plan, build_progress() as on_progress:
        done = run(bundle, options, on_progress=on_progress, say=note, on_plan=on_plan)
    if pruned:
        note(f"removed plans of other weights: {prune(bundle) / 1e6:.1f} MB")
    for built in done:
        if built.estimate is not None:
            name, expected = f"{built.stage}/{built.plan.graph}", built.estimate
            detail(f"{name}: {expected.nodes} nodes, {built.plan.seconds:.1f} s of about {expected.seconds:.1f}")
    if as_json:
        say_json([{"stage": each.stage, "how": each.how, **each.plan.model_dump(mode="json")} for each in done])
    else:
        show_table("", COLUMNS, map(_row, done))


def _row(built: "Built") -> tuple[str, ...]:
    plan = built.plan
    return (
        built.stage,
        plan.graph,
        " ".join(plan.targets) or (plan.device.name if plan.device else ""),
        plan.precision,
        f"{plan.bytes / 1e6:.1f}",
        f"{plan.seconds:.1f}",
        f"{plan.peak_rss / 1e6:.0f}",
        plan.path,
        HOWS[built.how],
    )
