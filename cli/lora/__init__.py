"""The `lora` commands. Each lies in a file named after it, which is imported when the command is called."""

import click

from ..lazy import LazyGroup, Place

COMMANDS = {
    "inspect": Place(".lora.inspect:inspect", "Show what a LoRA file holds and which network it fits."),
    "convert": Place(".lora.convert:convert", "Rewrite a LoRA in another format; its effect stays the same."),
    "merge": Place(".lora.merge:merge", "Write a checkpoint with LoRAs merged in."),
    "apply": Place(".lora.apply:apply", "Merge LoRAs into an exported bundle."),
}


@click.group(cls=LazyGroup, places=COMMANDS)
def lora() -> None:
    """Inspect, convert and merge LoRA files."""
