"""The command `demo`."""

from pathlib import Path

import click

from .console import FAILED, detail, inform, say, say_json
from .help import HelpfulCommand
from .options import AS_JSON, PATH, volume_options
from .verify_print import print_report, report_json


@click.command(cls=HelpfulCommand)
@click.option("-o", "--output", type=PATH, default=Path("demo"), show_default=True, help="Folder to make.")
@click.option("--force", is_flag=True, help="Replace an earlier demo; other files stay.")
@AS_JSON
@volume_options
def demo(output: Path, force: bool, as_json: bool) -> None:
    """Run every step once on a tiny cascade.

    The folder gets original files, a model folder, a bundle, an image and a parity report.

    Example: cascadekit demo -o demo
    """
    from ..parity.demo import make_demo

    report = make_demo(output, force=force, say=inform, note=detail)
    if as_json:
        say_json({"output": str(output), "image": str(output / "image.png"), **report_json(report)})
    else:
        print_report(report)
        say(f"wrote {output}: original files, model, bundle, image.png, parity.json")
    if not report:
        raise SystemExit(FAILED)
