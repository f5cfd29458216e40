"""The `lora` commands: inspect, convert, merge."""

import json
from pathlib import Path
from typing import Any

import click

from ..schemas.lora_keys import LoraFormat
from .common import PATH, all_local, local, maybe_local
from .console import byte_progress, note, say, show_table
from .lora_bundle import apply
from .lora_options import alpha_option, filter_option

WRITTEN = [kind.value for kind in LoraFormat if kind is not LoraFormat.LYCORIS]
SHOWN_METADATA = 120  # characters; thumbnails are longer

force_option = click.option("--force", is_flag=True, help="Replace files of the same names, or an earlier output.")


@click.group()
def lora() -> None:
    """Inspect, convert and merge LoRA files."""


@lora.command()
@click.argument("path", type=PATH)
@click.option("--against", type=PATH, help="The checkpoint it is for, where it is none of the released ones.")
@filter_option
@alpha_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: Path, against: Path | None, filters: tuple[str, ...], alpha: float | None, as_json: bool) -> None:
    """Say what a LoRA file holds and which network it fits.

    Example: cascadekit lora inspect style.safetensors
    """
    from ..converters.lora.inspect_lora import inspect_lora

    facts = inspect_lora(path, against=against, module_filters=filters, alpha=alpha, say=note)
    if as_json:
        say(json.dumps(facts, indent=2))
    else:
        show_facts(facts)


def show_facts(facts: dict[str, Any]) -> None:
    """Print what `converters.lora.summary` found."""
    for text in facts["notes"]:
        note(text)
    show_table("", ("property", "value"), _rows(facts))
    show_table("", ("target", "modules"), ((name, str(count)) for name, count in facts["targets"].items()))


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    plain = ("path", "format", "network", "modules", "text_encoder_modules")
    rows = [(name.replace("_", " "), str(facts[name])) for name in plain]
    for name in ("algorithms", "ranks", "alphas", "dtypes"):
        rows.append((name, ", ".join(f"{value} ({count})" for value, count in facts[name].items())))
    for embedding in facts["embeddings"]:
        where = f" for rows {embedding['indices']}" if embedding["indices"] else ""
        rows.append(("embedding", f"{embedding['name']} {embedding['shape']}{where}"))
    rows += [(key, _shortened(text)) for key, text in facts["metadata"].items()]
    return rows


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN_METADATA else f"{text[:SHOWN_METADATA]}... ({len(text)} characters)"


@lora.command()
@click.argument("path", type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="The .safetensors file, or for peft a folder, to make.")
@click.option("--to", required=True, type=click.Choice(WRITTEN), help="Format to write.")
@click.option("--against", type=PATH, help="The checkpoint it is for, where it is none of the released ones.")
@filter_option
@alpha_option
@click.option("--drop", is_flag=True, help="Leave out what the format cannot hold; it is listed.")
@force_option
def convert(
    path: Path,
    output: Path,
    to: str,
    against: Path | None,
    filters: tuple[str, ...],
    alpha: float | None,
    drop: bool,
    force: bool,
) -> None:
    """Rewrite a LoRA in another format; what it does to the weights stays the same.

    Example: cascadekit lora convert stability.safetensors --to comfyui -o comfyui.safetensors
    """
    from ..converters.lora.convert_lora import convert_lora

    done = convert_lora(
        local(path),
        output,
        to,
        against=maybe_local(against),
        module_filters=filters,
        alpha=alpha,
        drop=drop,
        force=force,
    )
    for text in done.notes:
        note(text)
    say(f"wrote {output} ({done.modules} modules, {to})")


@lora.command()
@click.argument("checkpoint", type=PATH)
@click.argument("loras", metavar="LORA...", nargs=-1, required=True, type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="File or folder to make, as the checkpoint is.")
@click.option(
    "--strength", "strengths", type=float, multiple=True, help="One for each LoRA, in their order.  [default: 1]"
)
@click.option(
    "--te-strength", "text_strengths", type=float, multiple=True, help="The same for the text encoder's parts."
)
@click.option("--text-encoder", type=PATH, help="Text encoder to merge into; the output is then a folder.")
@click.option("--unmerge", is_flag=True, help="Take the LoRAs out again.")
@filter_option
@alpha_option
@force_option
def merge(
    checkpoint: Path,
    loras: tuple[Path, ...],
    output: Path,
    strengths: tuple[float, ...],
    text_strengths: tuple[float, ...],
    text_encoder: Path | None,
    unmerge: bool,
    filters: tuple[str, ...],
    alpha: float | None,
    force: bool,
) -> None:
    """Write a checkpoint with LoRAs merged in, in the layout and dtype it has.

    Example: cascadekit lora merge stage_c.safetensors a.safetensors b.safetensors --strength 0.8 --strength 0.5
    -o merged.safetensors
    """
    from ..converters.lora.merge_checkpoint import merge_loras

    base, adapters, encoder = local(checkpoint), all_local(loras), maybe_local(text_encoder)
    with byte_progress() as start_file:
        done = merge_loras(
            base,
            adapters,
            output,
            strengths=strengths,
            text_encoder_strengths=text_strengths,
            text_encoder=encoder,
            module_filters=filters,
            alpha=alpha,
            unmerge=unmerge,
            force=force,
            start_file=start_file,
        )
    for text in done.notes:
        note(text)
    for part in done.unapplied:
        note(f"not applied: {part}")
    say(f"wrote {output}: {len(done.effects)} tensors changed, by {done.largest_change:.3g} at most")
    if unmerge:
        say(f"rounding leaves the values within {done.rounding:.3g} of those before the merge")


lora.add_command(apply)
