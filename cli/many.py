"""The command `many`."""

from pathlib import Path

import click

from .console import FAILED, finish, note, say
from .help import HelpfulCommand
from .options import AS_JSON, PATH, volume_options
from .signals import stoppable


@click.command(cls=HelpfulCommand)
@click.argument("commands", type=PATH)
@click.option("--ray", "address", metavar="local|HOST:PORT", default="local", show_default=True, help="Cluster to use.")
@click.option(
    "--log",
    type=PATH,
    help="Log as JSON lines; a second run skips commands that it has as done.  [default: COMMANDS with .log.jsonl]",
)
@AS_JSON
@volume_options
def many(commands: Path, address: str, log: Path | None, as_json: bool) -> None:
    """Run many convert, export and build commands on a Ray cluster.

    COMMANDS is a text file with a command a line, such as: export models/a -o bundles/a. Each command runs where its
    memory fits. Paths are those of the nodes: give whole ones, on a disk that all nodes share. A second run leaves out
    what is done.

    Example: cascadekit many commands.txt --ray head:6379
    """
    from ..runtime.batch.batch_log import BatchLog
    from ..runtime.cluster.command_tasks import read_commands, run_commands
    from ..runtime.cluster.connect import connected

    tasks = read_commands(commands)
    path = log or commands.with_suffix(".log.jsonl")
    counts = {"done": 0, "failed": 0, "skipped": 0}
    outcomes = []
    with BatchLog(path) as written, connected(address, note) as ray, stoppable() as stop:
        for outcome in run_commands(ray, tasks, written, stop):
            counts[outcome.kind] += 1
            outcomes.append(outcome.to_json())
            if not as_json and outcome.kind != "skipped":
                end = f": {outcome.error}" if outcome.error else f" ({outcome.seconds:.1f} s on {outcome.node})"
                say(f"[{len(outcomes)}/{len(tasks)}] {outcome.kind}: line {outcome.task.line}{end}")
    line = ", ".join(f"{number} {kind}" for kind, number in counts.items() if number)
    finish(f"{line}; log: {path}", {**counts, "log": str(path), "commands": outcomes}, as_json=as_json)
    if counts["failed"]:
        click.get_current_context().exit(FAILED)
