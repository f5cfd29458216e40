"""The command `lora merge`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import detail, finish, note
from ..dry_run import plan_only
from ..help import HelpfulCommand
from ..options import AS_JSON, DRY_RUN, PATH, volume_options
from ..progress import byte_progress
from .lora_options import (
    alpha_option,
    filter_option,
    force_option,
    loras_argument,
    paths_and_strengths,
    strength_option,
    text_strength_option,
)

if TYPE_CHECKING:
    from ...converters.lora.merge_plan import Merge


@click.command(cls=HelpfulCommand)
@click.argument("checkpoint", type=PATH)
@loras_argument(required=True)
@click.option("-o", "--output", required=True, type=PATH, help="File or folder to make; the same kind as CHECKPOINT.")
@strength_option
@text_strength_option
@click.option("--text-encoder", type=PATH, help="Text encoder to merge into; the output is then a folder.")
@click.option("--unmerge", is_flag=True, help="Take the LoRAs out again.")
@filter_option
@alpha_option
@force_option
@DRY_RUN
@AS_JSON
@volume_options
def merge(
    checkpoint: Path,
    loras: Sequence[tuple[str, float]],
    output: Path,
    text_encoder: Path | None,
    unmerge: bool,
    strengths: tuple[float, ...],
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write a checkpoint with LoRAs merged in.

    The output has the layout and dtype of CHECKPOINT.

    Example: cascadekit lora merge stage_c.safetensors a.safetensors:0.8 b.safetensors:0.5 -o merged.safetensors
    """
    from ...converters.lora.merge_checkpoint import merge_loras

    paths, chosen = paths_and_strengths(loras, strengths)
    options |= {"strengths": chosen, "text_encoder": text_encoder, "unmerge": unmerge, "say": note}
    with plan_only(dry_run, as_json=as_json) as on_plan, byte_progress() as start_file:
        done = merge_loras(checkpoint, paths, output, **options, start_file=start_file, on_plan=on_plan)
    if unmerge:
        note(f"rounding leaves the values within {done.rounding:.3g} of those before the merge")
    show_merge(output, done, as_json=as_json)


def show_merge(output: Path, done: "Merge", *, as_json: bool) -> None:
    """Print what a merge changed, and the parts of LoRAs that were not applied."""
    for text in done.notes:
        note(text)
    for part in done.unapplied:
        note(f"not applied: {part}")
    for effect in done.effects:
        detail(f"{effect.name}: {effect.dtype}, changed by {effect.largest_change:.3g} at most")
    facts = {
        "output": str(output),
        "changed": len(done.effects),
        "largest_change": done.largest_change,
        "unapplied": list(done.unapplied),
        "notes": list(done.notes),
    }
    line = f"wrote {output}: {len(done.effects)} tensors changed, by {done.largest_change:.3g} at most"
    finish(line, facts, as_json=as_json)
