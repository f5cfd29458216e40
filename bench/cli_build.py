"""The command that measures builds of GPU engines."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..cli.console import say, show_table
from .cli import AS_JSON, NETWORKS, WORK, machine_lines, show, show_progress

if TYPE_CHECKING:
    from . import BuildsReport

BUILD_COLUMNS = (
    "network",
    "graph",
    "nodes",
    "weights MB",
    "s",
    "CPU s",
    "of estimate",
    "own MB",
    "by weights",
    "of estimate",
    "RSS MB",
    "plan MB",
    "by weights",
)
ESTIMATE_COLUMNS = ("network", "graph", "nodes", "weights MB", "s", "own MB", "plan MB")


@click.command()
@WORK
@click.option(
    "--network",
    "networks",
    type=click.Choice([*NETWORKS, "tiny"]),
    multiple=True,
    help="Network to build engines of (repeatable).  [default: the lite cascade]",
)
@click.option("--arch", "targets", default="sm89", show_default=True, help="GPUs, with commas between.")
@click.option("--precision", type=click.Choice(["bf16", "fp16", "fp32"]), default="bf16", show_default=True)
@click.option("--static", metavar="WxH[xB]", help="Build for this size alone.  [default: from 512x512 to 1536x1536x2]")
@AS_JSON
def build(
    work: Path, networks: tuple[str, ...], targets: str, precision: str, static: str | None, as_json: bool
) -> None:
    """Measure builds by TensorRT-RTX of stages of real size, with random weights; no GPU is needed.

    The builds of the full prior and decoder are estimated. The command needs disk space for one network and its engine
    at a time, and 4 GB of memory for the lite cascade.

    Example: cascadekit bench build --network prior-lite --arch sm89
    """
    from ..schemas.precision import Precision
    from ..schemas.profiles import DEFAULT, Bounds, parse_image_size
    from ..schemas.targets import parse_targets
    from . import LITE_CASCADE, bench_builds

    size = parse_image_size(static) if static else None
    report = bench_builds(
        work,
        networks=networks or LITE_CASCADE,
        targets=parse_targets([targets]),
        precision=Precision(precision),
        bounds=Bounds(size, size, size) if size else DEFAULT,
        say=show_progress,
    )
    show(report, as_json, _print_builds)


def _print_builds(report: "BuildsReport") -> None:
    content = report.to_json()
    for line in machine_lines(content["machine"]):
        say(line)
    say(
        f"by {report.backend}. own: memory without pages of files, which count in RSS; by weights: divided by their "
        "size in the graph's precision; of estimate: divided by the estimate that `build` prints beforehand"
    )
    say("")
    show_table("", BUILD_COLUMNS, map(_build_row, content["builds"]))
    say("")
    rows = (
        [e["network"], e["graph"], str(e["nodes"]), *_megabytes(e["weights"]), f"{e['seconds']:.0f}", *_sizes(e)]
        for e in content["estimates"]
    )
    show_table("estimated", ESTIMATE_COLUMNS, rows)


def _build_row(figures: dict[str, Any]) -> list[str]:
    ratios = figures["ratios"]
    return [
        figures["network"],
        figures["graph"],
        str(figures["nodes"]),
        *_megabytes(figures["weight_bytes"]),
        f"{figures['seconds']:.1f}",
        f"{figures['cpu_seconds']:.1f}",
        f"{ratios['cpu_seconds / estimate']:.2f}",
        *_megabytes(figures["peak_own"]),
        f"{ratios['peak_own / weights']:.2f}",
        f"{ratios['peak_own / estimate']:.2f}",
        *_megabytes(figures["peak_rss"], figures["plan_bytes"]),
        f"{ratios['plan / weights']:.3f}",
    ]


def _sizes(estimate: dict[str, Any]) -> list[str]:
    return _megabytes(estimate["memory"], estimate["plan"])


def _megabytes(*sizes: int) -> list[str]:
    return [f"{size / 1e6:.0f}" for size in sizes]
