"""The command `demo`."""

from pathlib import Path

import click

from ..converters.checkpoints.example_model import EXAMPLE_PROMPT
from .console import FAILED, note, say
from .options import PATH
from .verify_print import print_report


@click.command()
@click.argument("prompt", default=EXAMPLE_PROMPT)
@click.option("-o", "--output", type=PATH, default=Path("demo"), show_default=True, help="Folder to make.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the image.")
@click.option("--force", is_flag=True, help="Replace an earlier demo; other files stay.")
def demo(prompt: str, output: Path, seed: int, force: bool) -> None:
    """Run every step once on a small trained cascade that is part of cascadekit.

    The model knows 114 objects in three styles of icons (flat, glossy, classic), and coloured shapes. The folder gets
    original files, a model folder, a bundle, images and a parity report.

    Example: cascadekit demo "a red apple, glossy style"
    """
    from ..parity.demo import make_demo

    report = make_demo(output, prompt, seed=seed, force=force, say=say, note=note)
    if report is not None:
        print_report(report)
    say("")
    say("Try next:")
    say(f'  cascadekit generate {output / "bundle"} "a purple star above a red heart" -o star.png')
    say(f"  cascadekit ui {output / 'bundle'}")
    say(f"  cascadekit inspect {output / 'original'}")
    if report is not None and not report:
        raise SystemExit(FAILED)
