"""Options that several `lora` commands share."""

import click

filter_option = click.option(
    "--module-filter",
    "filters",
    multiple=True,
    default=(".attn",),
    show_default=True,
    help="Stability's format: the trainer's module_filters (repeatable).",
)
alpha_option = click.option("--alpha", type=float, help="Alpha, where the file states none; its rank when left out.")
