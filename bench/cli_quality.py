"""The command that measures how often the example model generates what was asked for."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..cli.console import say, show_table
from ..cli.options import PATH
from .cli import AS_JSON, WORK, machine_lines, names_option, show, show_progress

if TYPE_CHECKING:
    from .quality import QualityReport

GROUPS = "precision steps sampler guidance rescale".split()
COLUMNS = ("setting", "seen", "held out", "icons", "shapes", "pairs", "style", "pictures")


@click.command()
@WORK
@click.option("--model", type=PATH, help="Measure these files of another training, in place of the example model.")
@names_option("--groups", GROUPS, ",".join(GROUPS))
@click.option("--each", type=click.IntRange(2, 1000), default=32, show_default=True, help="Pictures of each kind.")
@AS_JSON
def quality(work: Path, model: Path | None, groups: list[str], each: int, as_json: bool) -> None:
    """Measure the share of prompts that the example model generates right, by precision, steps and guidance.

    A judge looks at the pixels alone. It asks for icons, coloured shapes and pairs of shapes.

    Example: cascadekit bench quality --groups steps,guidance --each 64
    """
    from .quality import bench_quality

    show(bench_quality(work, model=model, groups=groups, each=each, say=show_progress), as_json, _print_quality)


def _print_quality(report: "QualityReport") -> None:
    for line in machine_lines(report.to_json()["machine"]):
        say(line)
    for group, rows in report.shares.items():
        say("")
        show_table(group, COLUMNS, ([name, *shares.cells()] for name, shares in rows.items()))
    for name, why in report.missing.items():
        say(f"{name}: {why}")
