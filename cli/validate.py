"""The command `validate`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..schemas.messages import listed
from .console import FAILED, Volume, detail, note, say, say_json, show_table, volume
from .help import HelpfulCommand
from .options import AS_JSON, PATH, WEIGHTS, volume_options

if TYPE_CHECKING:
    from ..converters.export.validate import BundleCheck, Validation


@click.command(cls=HelpfulCommand)
@click.argument("bundle", type=PATH)
@click.option("--hash", is_flag=True, help="Compare every byte by SHA-256; files without a recorded one by samples.")
@AS_JSON
@volume_options
def validate(bundle: Path, hash: bool, as_json: bool) -> None:
    """Check a bundle's graphs, weights and files.

    Nothing is run. Exit code 1 when something is wrong. With --verbose, every check is listed.

    Example: cascadekit validate bundle --hash
    """
    from ..converters.export.validate import validate as run

    result = run(bundle, hash=hash, say=detail)
    if as_json:
        say_json(result.to_json())
    else:
        print_validation(result)
    if not result:
        raise SystemExit(FAILED)


def print_validation(result: "Validation") -> None:
    """Print what is wrong and a line that sums up; with --verbose, every check."""
    shown = [check for check in result.checks if check.problems or volume() is Volume.VERBOSE]
    if shown:
        show_table("", ("stage", "checked", "verdict", "found"), _rows(shown))
    stages = {check.stage for check in result.checks if check.stage is not None}
    graphs = sum(bool(check.stage and check.subject) for check in result.checks)
    files = sum(check.facts.get("files", 0) for check in result.checks if not check.subject)
    counts = ((len(stages), "stage"), (graphs, "graph"), (files, "file"))
    counted = ", ".join(f"{number} {noun}{'' if number == 1 else 's'}" for number, noun in counts)
    say(f"{'valid' if result else 'INVALID'}: {counted}")
    count = sum(len(check.facts.get("without_sha256", ())) for check in result.checks)
    if count:
        note(f"{count} files were exported without a SHA-256: of their bytes only samples can be compared")


def _rows(checks: "Sequence[BundleCheck]") -> Iterator[tuple[str, ...]]:
    for check in checks:
        facts = check.facts
        if check.stage is None:
            rest = f"{facts['files']} files"
            rest += f"; in no list: {listed(facts['unlisted'])}" if facts["unlisted"] else ""
        elif check.subject:
            count = sum(facts.get("operators", {}).values())
            kinds = ", ".join(f"{name} {n}" for name, n in facts.get("operators", {}).items())
            rest = f"{count} nodes: {kinds}; opset {facts.get('opset')}, IR {facts.get('ir_version')}"
            rest += f"; polygraphy {facts['polygraphy']}" if "polygraphy" in facts else ""
        else:
            unhashed = ", ".join(_unhashed(file) for file in facts["without_sha256"])
            rest = f"{facts['files']} files, weights: {WEIGHTS[facts['weights']]}"
            rest += f"; no SHA-256 recorded: {unhashed}" if unhashed else ""
            rest += f"; {facts['plans']['current']} GPU engines" if "plans" in facts else ""
        yield check.stage or "bundle", check.subject or "files", "; ".join(check.problems) or "ok", rest


def _unhashed(file: dict[str, str | None]) -> str:
    return f"{file['path']} (now {file['sha256_now']})" if file["sha256_now"] else str(file["path"])
