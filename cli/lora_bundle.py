"""The `lora` command that works on exported bundles."""

from pathlib import Path

import click

from ..schemas.errors import UsageError
from .common import PATH, all_local
from .console import byte_progress, note, say
from .lora_options import alpha_option, filter_option


@click.command()
@click.argument("bundle", type=PATH)
@click.argument("loras", metavar="LORA...", nargs=-1, type=PATH)
@click.option(
    "--strength", "strengths", type=float, multiple=True, help="One for each LoRA, in their order.  [default: 1]"
)
@click.option(
    "--te-strength", "text_strengths", type=float, multiple=True, help="The same for the text encoder's parts."
)
@click.option("--undo", is_flag=True, help="Put the weights back as they were, to the last byte.")
@filter_option
@alpha_option
def apply(
    bundle: Path,
    loras: tuple[Path, ...],
    strengths: tuple[float, ...],
    text_strengths: tuple[float, ...],
    undo: bool,
    filters: tuple[str, ...],
    alpha: float | None,
) -> None:
    """Merge LoRAs into an exported bundle's weights; its graphs stay. The old weights are kept beside the new ones
    for --undo.

    Example: cascadekit lora apply bundle style.safetensors --strength 0.8
    """
    from ..converters.lora.merge_bundle import apply_loras, undo_loras

    if undo == bool(loras):
        raise UsageError("expected LoRAs to apply, or --undo without any")
    if undo:
        say(f"wrote {bundle}: without {', '.join(undo_loras(bundle))} again")
        return
    with byte_progress() as start_file:
        done = apply_loras(
            bundle,
            all_local(loras),
            strengths=strengths,
            text_encoder_strengths=text_strengths,
            module_filters=filters,
            alpha=alpha,
            start_file=start_file,
        )
    for text in done.notes:
        note(text)
    for part in done.unapplied:
        note(f"not applied: {part}")
    say(f"wrote {bundle}: {len(done.effects)} tensors changed, by {done.largest_change:.3g} at most")
