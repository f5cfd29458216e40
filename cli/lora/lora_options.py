"""Options that several `lora` commands share."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click

from ...schemas.errors import UsageError
from ..options import PATH, parse_lora, parsed

against_option = click.option(
    "--against", type=PATH, help="Checkpoint that the LoRA was trained on, if it is not a released one."
)
filter_option = click.option(
    "--module-filter",
    "module_filters",
    multiple=True,
    default=(".attn",),
    show_default=True,
    help="For Stability's format: `module_filters` of the training config (repeatable).",
)
alpha_option = click.option("--alpha", type=float, help="Alpha, if the file has none.  [default: the rank]")
# Its value is a tuple of names and strengths.
loras_argument = partial(click.argument, "loras", metavar="FILE[:STRENGTH]...", nargs=-1, callback=parsed(parse_lora))
strength_option = click.option(
    "--strength",
    "strengths",
    type=float,
    multiple=True,
    help="Strength of a LoRA, in place of FILE:STRENGTH; give one for each, in their order.  [default: 1]",
)
text_strength_option = click.option(
    "--te-strength",
    "text_encoder_strengths",
    type=float,
    multiple=True,
    help="Strength of a LoRA's text encoder part; give one for each, in their order.  [default: --strength]",
)
force_option = click.option("--force", is_flag=True, help="Replace files of the same names, or an earlier output.")


def paths_and_strengths(
    loras: Sequence[tuple[str, float]], strengths: Sequence[float]
) -> tuple[list[Path], Sequence[float]]:
    """The files of FILE[:STRENGTH], and the strength of each. Raises UsageError for strengths given in both ways."""
    if strengths and any(strength != 1 for _, strength in loras):
        raise UsageError("FILE:STRENGTH and strengths=...: give the strengths in one way")
    return [Path(name) for name, _ in loras], strengths or [strength for _, strength in loras]
