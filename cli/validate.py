"""The command `validate`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..schemas.messages import listed
from .console import FAILED, note, say, show_table
from .help import HelpfulCommand
from .options import PATH, WEIGHTS

if TYPE_CHECKING:
    from ..converters.export.validate import Validation


@click.command(cls=HelpfulCommand)
@click.argument("bundle", type=PATH)
@click.option("--hash", is_flag=True, help="Compare every byte by SHA-256; files without a recorded one by samples.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def validate(bundle: Path, hash: bool, as_json: bool) -> None:
    """Check a bundle's graphs, weights and files.

    Nothing is run. Exit code 1 when something is wrong.

    Example: cascadekit validate bundle --hash
    """
    from ..converters.export.validate import validate as run

    result = run(bundle, hash=hash, say=lambda text: None if as_json else note(text))
    if as_json:
        say(json.dumps(result.to_json(), indent=2))
    else:
        print_validation(result)
    if not result:
        raise SystemExit(FAILED)


def print_validation(result: "Validation") -> None:
    rows = []
    for check in result.checks:
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
        rows.append((check.stage or "bundle", check.subject or "files", "; ".join(check.problems) or "ok", rest))
    show_table("", ("stage", "checked", "verdict", "found"), rows)
    say("valid" if result else "INVALID")
    count = sum(len(check.facts.get("without_sha256", ())) for check in result.checks)
    if count:
        note(f"{count} files were exported without a SHA-256: of their bytes only samples can be compared")


def _unhashed(file: dict[str, str | None]) -> str:
    return f"{file['path']} (now {file['sha256_now']})" if file["sha256_now"] else str(file["path"])
