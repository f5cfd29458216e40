"""The command `demo`."""

from pathlib import Path

import click

from .console import FAILED, note, say
from .options import PATH
from .verify_print import print_report


@click.command()
@click.option("-o", "--output", type=PATH, default=Path("demo"), show_default=True, help="Folder to make.")
@click.option("--force", is_flag=True, help="Replace an earlier demo; other files stay.")
def demo(output: Path, force: bool) -> None:
    """Run every step once on a tiny cascade.

    The folder gets original files, a model folder, a bundle, an image and a parity report.

    Example: cascadekit demo -o demo
    """
    from ..parity.demo import make_demo

    report = make_demo(output, force=force, say=say, note=note)
    print_report(report)
    say(f"image: {output / 'image.png'}")
    say(f"parity table: {output / 'parity.json'}")
    if not report:
        raise SystemExit(FAILED)
