"""Options that several `lora` commands share."""

import click

from ..options import PATH

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
strength_option = click.option(
    "--strength",
    "strengths",
    type=float,
    multiple=True,
    help="Strength of a LoRA; give one for each, in their order.  [default: 1]",
)
text_strength_option = click.option(
    "--te-strength",
    "text_encoder_strengths",
    type=float,
    multiple=True,
    help="Strength of a LoRA's text encoder part; give one for each, in their order.  [default: --strength]",
)
force_option = click.option("--force", is_flag=True, help="Replace files of the same names, or an earlier output.")
