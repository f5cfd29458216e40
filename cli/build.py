"""The command that builds GPU engines, and how a bundle is shown."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from ..schemas.errors import CascadeError, UsageError
from ..schemas.precision import Precision
from ..schemas.profiles import DEFAULT, Bounds, parse_image_size, shown
from ..schemas.stages import Stage
from ..schemas.targets import PLAIN, RTX, parse_targets
from .common import PATH, STAGES, local, maybe_local
from .console import byte_progress, complain, err, note, say, show_table
from .escape import visible_line

if TYPE_CHECKING:
    from ..converters.tensorrt import BuildProgress, Built
    from ..schemas.bundle import ImageSize

COLUMNS = ("stage", "graph", "for", "precision", "MB", "seconds", "peak MB", "plan", "")
HOWS = {"built": "built", "kept": "was there", "cached": "from the cache"}
QUIET = 10.0  # seconds between two lines about one build in a pipe


def _parse_size(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """One size, or as many as were given."""
    try:
        return tuple(map(parse_image_size, value)) if isinstance(value, tuple) else value and parse_image_size(value)
    except UsageError as error:
        raise click.BadParameter(str(error)) from None


def _parse_arch(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    try:
        return parse_targets(values)
    except UsageError as error:
        raise click.BadParameter(str(error)) from None


def _parse_profiles(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[Bounds, ...]:
    found = []
    for value in values:
        sizes = value.split(":")
        if len(sizes) != 3:
            raise click.BadParameter(f"{value!r}: expected MIN:OPT:MAX, such as 512x512:1024x1024:1536x1536x2")
        try:
            found.append(Bounds(*map(parse_image_size, sizes)))
        except CascadeError as error:
            raise click.BadParameter(str(error)) from None
    return tuple(found)


def _size_option(name: str, text: str) -> Callable[..., Any]:
    default = shown(getattr(DEFAULT, name))
    return click.option(
        f"--{name}", f"{name}_size", metavar="HxW[xB]", callback=_parse_size, help=f"{text}  [default: {default}]"
    )


@click.command()
@click.argument("bundle", type=PATH)
@click.option(
    "--backend",
    type=click.Choice([RTX, PLAIN]),
    default=RTX,
    show_default=True,
    help="tensorrt-rtx needs no GPU and builds for those named; tensorrt builds for the GPU of this machine.",
)
@click.option(
    "--arch",
    "targets",
    metavar="GPU",
    multiple=True,
    callback=_parse_arch,
    help="GPU to build for, such as sm89 or 'rtx 4090' (repeatable, or with commas); one plan serves several.",
)
@click.option("--stage", "stages", multiple=True, type=STAGES, help="Build this stage only (repeatable).")
@click.option(
    "--graph",
    "graphs",
    multiple=True,
    help="Build graphs of this name, such as model or encoder (repeatable).  [default: those that generate runs]",
)
@_size_option("min", "Smallest images, height x width x how many at a time (1 if not said).")
@_size_option("opt", "Likeliest images: these are fastest.")
@_size_option("max", "Largest images.")
@click.option(
    "--static",
    "statics",
    metavar="HxW[xB]",
    multiple=True,
    callback=_parse_size,
    help="A profile for this size alone (repeatable).",
)
@click.option(
    "--profile",
    "profiles",
    metavar="MIN:OPT:MAX",
    multiple=True,
    callback=_parse_profiles,
    help="A profile more (repeatable): several narrow ones run faster than a wide one.",
)
@click.option("-o", "--output", type=PATH, help="Export first: BUNDLE is a model then, and this the bundle to make.")
@click.option(
    "--precision",
    type=click.Choice([precision.value for precision in Precision]),
    help="What that export computes in.  [default: bf16, fp16 for sm75]",
)
@click.option("--text-encoder", type=PATH, help="CLIP bigG text encoder for that export, when the model holds none.")
@click.option("--refittable", is_flag=True, help="With tensorrt: engines that can be given a LoRA's weights later.")
@click.option("--weights-as-inputs", is_flag=True, help="Experimental: plans to which any LoRA's weights are fed.")
@click.option("--weight-streaming", is_flag=True, help="Plans whose weights may stay in the host's memory.")
@click.option("--cache", type=PATH, help="Folder of plans that bundles share.")
@click.option("--prune", "pruned", is_flag=True, help="Remove plans of other weights than the bundle has now.")
@click.option("--no-memory-check", is_flag=True, help="Start even if memory seems too little.")
@click.option("--force", is_flag=True, help="Build again what is there already; replace the bundle of -o.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def build(
    bundle: Path,
    backend: str,
    targets: tuple[str, ...],
    stages: tuple[str, ...],
    graphs: tuple[str, ...],
    min_size: "ImageSize | None",
    opt_size: "ImageSize | None",
    max_size: "ImageSize | None",
    statics: "tuple[ImageSize, ...]",
    profiles: tuple[Bounds, ...],
    output: Path | None,
    precision: str | None,
    text_encoder: Path | None,
    refittable: bool,
    weights_as_inputs: bool,
    weight_streaming: bool,
    cache: Path | None,
    pruned: bool,
    no_memory_check: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Build GPU engines of a bundle's graphs; with tensorrt-rtx on any machine, for any GPU.

    Example: cascadekit build bundle --arch sm89 --arch "rtx 5090"
    From original files to engines: cascadekit build model -o bundle --arch sm89
    """
    from ..converters.tensorrt import BuildOptions, prune
    from ..converters.tensorrt import build as run
    from ..converters.tensorrt.export_for_build import export_for_build

    bounds = tuple(Bounds(size, size, size) for size in statics) + profiles
    if min_size or opt_size or max_size or not bounds:
        bounds = (Bounds(min_size or DEFAULT.min, opt_size or DEFAULT.opt, max_size or DEFAULT.max), *bounds)
    options = BuildOptions(
        backend=backend,
        targets=targets,
        stages=tuple(Stage(stage) for stage in stages),
        graphs=graphs,
        profiles=bounds,
        refittable=refittable,
        force=force,
        cache=cache,
        check_memory=not no_memory_check,
        weights_as_inputs=weights_as_inputs,
        weight_streaming=weight_streaming,
    )
    if output is not None:
        with byte_progress() as start_file:
            export_for_build(
                local(bundle),
                output,
                options,
                precision=Precision(precision) if precision else None,
                text_encoder=maybe_local(text_encoder),
                start_file=start_file,
                say=note,
            )
        bundle = output
    elif precision or text_encoder:
        raise UsageError("--precision and --text-encoder are for the export that -o asks for")
    with _progress() as on_progress:
        done = run(bundle, options, on_progress=on_progress, say=note)
    if pruned:
        note(f"removed plans of other weights: {prune(bundle) / 1e6:.1f} MB")
    if as_json:
        say(json.dumps([_described(built) for built in done], indent=2))
    else:
        show_table("", COLUMNS, map(_row, done))


@contextmanager
def _progress() -> "Iterator[Callable[[BuildProgress], object]]":
    """A line that changes on a terminal; in a pipe one at the start of a build, and one in a while."""
    if err.is_terminal:
        with err.status("") as status:
            yield lambda progress: status.update(Text(visible_line(_line(progress))))
        return
    last: dict[str, float] = {}

    def print_some(progress: "BuildProgress") -> None:
        if progress.name not in last or monotonic() - last[progress.name] >= QUIET:
            last[progress.name] = monotonic()
            complain(_line(progress))

    yield print_some


def _line(progress: "BuildProgress") -> str:
    return (
        f"{progress.name}: {progress.elapsed:.0f} s of about {max(progress.estimate, 1):.0f}, {progress.phase}, "
        f"{progress.rss / 1e6:.0f} MB"
    )


def _described(built: "Built") -> dict[str, Any]:
    return {"stage": built.stage, "how": built.how, **built.plan.model_dump(mode="json")}


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
