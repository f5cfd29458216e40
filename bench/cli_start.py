"""The command that measures how soon the command line starts."""

import json
import sys
from pathlib import Path
from statistics import median

import click

from ..cli.console import say, show_table
from ..converters.checkpoints.convert import convert
from ..converters.checkpoints.tiny_cascade import write_tiny_cascade
from ..converters.export.export import export
from .cli import AS_JSON, WORK, machine_lines, runs_option, seconds
from .process import bench_folder, launch

PROGRAM = (sys.executable, "-c", "from cascadekit.__main__ import main; main()")  # what `cascadekit` runs
NOTHING = "python, nothing imported"
START_COLUMNS = ("command", "median s", "min s", "max s")


@click.command()
@WORK
@runs_option("Rounds; every command runs once in each.")
@click.option("--model", type=click.Path(path_type=Path), help="Also inspect this model or bundle.")
@AS_JSON
def start(work: Path, runs: int, model: Path | None, as_json: bool) -> None:
    """Measure how long `--help` and `inspect` take, from the start of a process to its end.

    Example: cascadekit bench start --runs 20
    """
    with bench_folder(work) as (folder, machine):
        write_tiny_cascade(folder / "original")
        convert(folder / "original", folder / "model", "diffusers")
        export(folder / "model", folder / "bundle")
        lines = {
            "--help": ["--help"],
            "generate --help": ["generate", "--help"],
            "inspect, a file": ["inspect", str(folder / "original" / "stage_c.safetensors")],
            "inspect, a model folder": ["inspect", str(folder / "model")],
            "inspect, a bundle": ["inspect", str(folder / "bundle")],
            **({f"inspect {model}": ["inspect", str(model)]} if model else {}),
        }
        commands: dict[str, tuple[str, ...]] = {NOTHING: (sys.executable, "-c", "pass")}
        commands |= {name: (*PROGRAM, *words) for name, words in lines.items()}
        taken: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(runs + 1):
            for name, command in commands.items():
                taken[name].append(launch(command, label=name)[0].seconds)
    taken = {name: found[1:] for name, found in taken.items()}  # the first round fills the caches
    if as_json:
        say(json.dumps({"machine": machine, "seconds": taken}, indent=2))
        return
    for line in machine_lines(machine):
        say(line)
    rows = ((name, *seconds([median(found), min(found), max(found)])) for name, found in taken.items())
    show_table("", START_COLUMNS, rows)
