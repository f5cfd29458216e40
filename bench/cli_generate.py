"""The command that measures whole generations."""

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from ..cli.console import say, show_table
from ..cli.options import PATH, parse_size, parsed
from .cli import AS_JSON, WORK, machine_lines, names_option, runs_option, seconds, show, show_progress

if TYPE_CHECKING:
    from . import GenerateReport

PROGRAMS = "onnxruntime openvino openvino-bf16 diffusers diffusers-bf16".split()
DEFAULT_PROGRAMS = "onnxruntime,openvino-bf16,diffusers,diffusers-bf16"
GENERATION_COLUMNS = [*"program text_encoder prior decoder vqgan image load loop ratio".split(), "peak MB", "version"]


@click.command()
@WORK
@click.option("--model", type=PATH, help="Measure with this model folder, without a stand-in.")
@click.option("--tiny", is_flag=True, help="Measure with the tiny cascade, for tests of this command.")
@names_option("--programs", PROGRAMS, DEFAULT_PROGRAMS)
@click.option("--size", metavar="WxH", default="512x512", show_default=True, callback=parsed(parse_size))
@click.option("--prior-steps", type=click.IntRange(1), default=4, show_default=True)
@click.option("--decoder-steps", type=click.IntRange(1), default=2, show_default=True)
@click.option(
    "--memory", default="resident", show_default=True, help="The option of generate; diffusers keeps all stages loaded."
)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True, help="Processes of each program.")
@runs_option("Images in each process, after one that is not measured.")
@AS_JSON
def generate(
    work: Path,
    model: Path | None,
    tiny: bool,
    programs: list[str],
    size: tuple[int, int],
    prior_steps: int,
    decoder_steps: int,
    as_json: bool,
    **how: Any,
) -> None:
    """Measure whole generations, and diffusers' pipelines on the same weights, one after the other in each round.

    Example: cascadekit bench generate --programs onnxruntime,diffusers --size 1024x1024
    """
    from . import bench_generate

    report = bench_generate(
        work,
        model=model,
        tiny=tiny,
        programs=programs,
        size=size[::-1],
        steps=(prior_steps, decoder_steps),
        say=show_progress,
        **how,
    )
    show(report, as_json, _print_generations)


def _print_generations(report: "GenerateReport") -> None:
    content = report.to_json()
    for line in machine_lines(content["machine"]):
        say(line)
    say(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in content["job"].items()))
    say(f"memory that generate predicts: {report.predicted_peak / 1e6:.0f} MB")
    say(
        "Medians of all rounds, in seconds: each stage's network (of a step, for prior and decoder), an image in all, "
        "loading before it; loop: the share of an image that no network took; ratio: to the first program, in a round."
    )
    say("")
    show_table("", GENERATION_COLUMNS, (_generation_row(n, each) for n, each in content["programs"].items()))
    for name, why in report.missing.items():
        say(f"{name}: {why}")


def _generation_row(name: str, found: dict[str, Any]) -> list[str]:
    return [
        name,
        *seconds([median(each) for each in found["stage_seconds"].values()]),
        *seconds([median(found["image_seconds"]), median(found["load_seconds"])]),
        f"{found['loop_share']:.2%}",
        f"{median(found['ratios']):.2f}",
        f"{found['peak_rss'] / 1e6:.0f}",
        found["version"],
    ]
