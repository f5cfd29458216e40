"""The command `demo`."""

from pathlib import Path

import click

from ..converters.checkpoints.example_model import EXAMPLE_PROMPT
from .console import FAILED, detail, inform, say, say_json
from .help import HelpfulCommand
from .options import AS_JSON, PATH, SEED, volume_options
from .verify_print import print_report, report_json

NEXT = (
    "Try next:",
    '  cascadekit generate {demo}/bundle "a purple star above a red heart" -o star.png',
    '  cascadekit generate {demo}/bundle "a strawberry" --lora {demo}/lora/cyanotype.safetensors -o blue.png',
    "  cascadekit ui {demo}/bundle",
    "  cascadekit inspect {demo}/original",
)


@click.command(cls=HelpfulCommand)
@click.argument("prompt", default=EXAMPLE_PROMPT)
@click.option("-o", "--output", type=PATH, default=Path("demo"), show_default=True, help="Folder to make.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the image.")
@click.option("--force", is_flag=True, help="Replace an earlier demo; other files stay.")
@AS_JSON
@volume_options
def demo(prompt: str, output: Path, seed: int, force: bool, as_json: bool) -> None:
    """Run every step once on a small trained cascade that is part of cascadekit.

    The model knows 114 objects in three styles of icons (flat, glossy, classic), and coloured shapes. The folder gets
    original files, a model folder, a bundle, images and a parity report.

    Example: cascadekit demo "a red apple, glossy style"
    """
    from ..parity.demo import make_demo

    report = make_demo(output, prompt, seed=seed, force=force, say=inform, note=detail)
    if as_json:
        facts = report_json(report) if report is not None else {"passed": None}
        say_json({"output": str(output), "image": str(output / "image.png"), **facts})
    else:
        if report is not None:
            print_report(report)
        page = "report.html, " if report is not None else ""
        say(f"wrote {output}: original files, LoRA, model, bundle, image.png, prompts.png, {page}parity.json")
        for line in NEXT:
            say(line.format(demo=output))
    if report is not None and not report:
        raise SystemExit(FAILED)
