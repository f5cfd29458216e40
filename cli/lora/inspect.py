"""The command `lora inspect`."""

from pathlib import Path
from typing import Any

import click

from ..console import note, say_json, show_table
from ..help import HelpfulCommand
from ..options import AS_JSON, PATH
from .lora_options import against_option, alpha_option, filter_option

SHOWN_METADATA = 120  # characters of each value; thumbnails are much longer


@click.command(cls=HelpfulCommand)
@click.argument("path", type=PATH)
@against_option
@filter_option
@alpha_option
@AS_JSON
def inspect(
    path: Path, against: Path | None, module_filters: tuple[str, ...], alpha: float | None, as_json: bool
) -> None:
    """Show what a LoRA file holds and which network it fits.

    Example: cascadekit lora inspect style.safetensors
    """
    from ...converters.lora.inspect_lora import inspect_lora

    facts = inspect_lora(path, against=against, module_filters=module_filters, alpha=alpha, say=note)
    if as_json:
        say_json(facts)
    else:
        show_facts(facts)


def show_facts(facts: dict[str, Any]) -> None:
    """Print the facts that `converters.lora.inspect_lora` returns."""
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
    taken = {name for name, _ in rows}  # a file has a "format", too, which says "pt"
    rows += [(f"metadata: {key}" if key in taken else key, _shortened(text)) for key, text in facts["metadata"].items()]
    return rows


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN_METADATA else f"{text[:SHOWN_METADATA]}... ({len(text)} characters)"
