"""The command `lora apply`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ...schemas.errors import UsageError
from ..console import finish
from ..help import HelpfulCommand
from ..options import AS_JSON, PATH, local, volume_options
from ..progress import byte_progress
from .lora_options import (
    alpha_option,
    filter_option,
    loras_argument,
    paths_and_strengths,
    strength_option,
    text_strength_option,
)
from .merge import show_merge


@click.command(cls=HelpfulCommand)
@click.argument("bundle", type=PATH)
@loras_argument()
@strength_option
@text_strength_option
@click.option("--undo", is_flag=True, help="Restore the earlier weights, byte for byte.")
@filter_option
@alpha_option
@AS_JSON
@volume_options
def apply(
    bundle: Path,
    loras: Sequence[tuple[str, float]],
    undo: bool,
    strengths: tuple[float, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Merge LoRAs into an exported bundle.

    The graphs stay as they are. The earlier weights are kept beside the new ones for --undo.

    Example: cascadekit lora apply bundle style.safetensors:0.8
    """
    from ...converters.lora.merge_bundle import apply_loras, undo_loras

    if undo == bool(loras):
        raise UsageError("give LoRAs to apply, or --undo without LoRAs")
    if undo:
        undone = undo_loras(bundle)
        facts = {"output": str(bundle), "undone": list(undone)}
        finish(f"wrote {bundle}: without {', '.join(undone)} again", facts, as_json=as_json)
        return
    paths, options["strengths"] = paths_and_strengths(loras, strengths)
    with byte_progress() as start_file:
        done = apply_loras(bundle, [local(path) for path in paths], **options, start_file=start_file)
    show_merge(bundle, done, as_json=as_json)
