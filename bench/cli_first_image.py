"""The command that measures a cold start."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..cli.console import say, show_table
from ..cli.options import PATH, parse_size, parsed
from ..runtime.engines.choose_device import DEVICES
from ..runtime.engines.engine_table import AUTO, ENGINES
from .cli import AS_JSON, machine_lines, runs_option, show, show_progress

if TYPE_CHECKING:
    from .first_image import FirstImageReport

COLUMNS = ("process", "open", "load", "first steps", "other steps", "rest", "first image", "later images")


@click.command("first-image")
@click.argument("bundle", type=PATH)
@click.option("--device", type=click.Choice(DEVICES), default=AUTO, show_default=True)
@click.option("--engine", type=click.Choice([AUTO, *ENGINES]), default=AUTO, show_default=True)
@click.option("--memory", default="resident", show_default=True, help="The option of generate.")
@click.option("--size", metavar="WxH", default="1024x1024", show_default=True, callback=parsed(parse_size))
@click.option("--prior-steps", type=click.IntRange(1), default=20, show_default=True)
@click.option("--decoder-steps", type=click.IntRange(1), default=10, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Threads of the CPU.  [default: the engine's choice]")
@click.option("--cuda-graph/--no-cuda-graph", default=True, show_default=True, help="The option of generate.")
@click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True, help="Fresh processes.")
@runs_option("Further images in each process.")
@AS_JSON
def first_image(
    bundle: Path,
    size: tuple[int, int],
    prior_steps: int,
    decoder_steps: int,
    threads: int | None,
    rounds: int,
    as_json: bool,
    **how: Any,
) -> None:
    """Measure a cold start: from the start of a process to its first image.

    The bundle's files are in the page cache before.

    Example: cascadekit bench first-image bundle --device cuda --rounds 3
    """
    from .first_image import FirstImageJob, bench_first_image

    steps = prior_steps, decoder_steps
    job = FirstImageJob(threads=threads or 0, bundle=str(bundle.absolute()), size=size[::-1], steps=steps, **how)
    show(bench_first_image(job, rounds, show_progress), as_json, _print_rounds)


def _print_rounds(report: "FirstImageReport") -> None:
    for line in machine_lines(report.machine):
        say(line)
    say(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in report.job.items()))
    say("Seconds. open: from the start of the process until the bundle is open; load: of all stages;")
    say("rest: of the other stages, and of prior and decoder between their steps.")
    say("")
    show_table("", COLUMNS, (_row(number, each) for number, each in enumerate(report.rounds, 1)))
    for text in dict.fromkeys(text for each in report.rounds for text in each["said"]):
        say(text)


def _row(number: int, found: dict[str, Any]) -> list[str]:
    sums = [sum(found[name].values()) for name in ("load", "first_step", "steps", "run")]
    values = [found["open"], *sums, found["first_image"]]
    return [str(number), *(f"{value:.2f}" for value in values), ", ".join(f"{value:.2f}" for value in found["images"])]
