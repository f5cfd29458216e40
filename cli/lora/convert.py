"""The command `lora convert`."""

from pathlib import Path
from typing import Any

import click

from ...schemas.lora_keys import LoraFormat
from ..console import detail, finish, note
from ..help import HelpfulCommand
from ..options import AS_JSON, PATH, volume_options
from .lora_options import against_option, alpha_option, filter_option, force_option

WRITTEN = [kind.value for kind in LoraFormat if kind is not LoraFormat.LYCORIS]


@click.command(cls=HelpfulCommand)
@click.argument("source", type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="The .safetensors file to make; for peft, a folder.")
@click.option("--to", required=True, type=click.Choice(WRITTEN), help="Format to write.")
@against_option
@filter_option
@alpha_option
@click.option("--drop", is_flag=True, help="Leave out the tensors that the format cannot hold, and list them.")
@force_option
@AS_JSON
@volume_options
def convert(source: Path, output: Path, to: str, against: Path | None, as_json: bool, **options: Any) -> None:
    """Rewrite a LoRA in another format; its effect stays the same.

    Example: cascadekit lora convert stability.safetensors --to comfyui -o comfyui.safetensors
    """
    from ...converters.lora.convert_lora import convert_lora

    done = convert_lora(source, output, to, against=against, **options, say=note)
    for text in done.details:
        detail(text)
    for text in done.notes:
        note(text)
    facts = {"output": str(output), "format": to, "modules": done.modules, "notes": list(done.notes)}
    finish(f"wrote {output} ({done.modules} modules, {to})", facts, as_json=as_json)
