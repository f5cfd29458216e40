"""Commands that read and rewrite checkpoints."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..schemas.errors import LayoutError, UsageError
from ..schemas.folders import parse_size
from ..schemas.layouts import Layout, can_become
from ..schemas.weight_dtypes import DTYPES
from .common import PATH, all_local, maybe_local
from .console import FAILED, byte_progress, note, say, show_table
from .lora import show_facts

if TYPE_CHECKING:
    from ..converters.checkpoints.component import Component

INSPECT_COLUMNS = ("component", "layout", "variant", "dtype", "parameters", "problems", "file")


def _parse_shard_size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    try:
        return parse_size(value) if value is not None else None
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command()
@click.argument("path", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: Path, as_json: bool) -> None:
    """Say what a file or folder holds, from its headers alone; a bundle with its GPU engines.

    On the Hub only headers are transferred: cascadekit inspect hf://stabilityai/stable-cascade
    A LoRA is shown as `cascadekit lora inspect` shows it.

    Example: cascadekit inspect stage_c_lite_bf16.safetensors
    """
    from ..converters.checkpoints.provenance import licence_fields
    from .inspect_bundle import is_bundle, show_bundle

    if is_bundle(path):
        if not show_bundle(path, as_json=as_json):
            raise SystemExit(FAILED)
        return
    found = _components(path)
    if isinstance(found, dict):
        say(json.dumps([found], indent=2)) if as_json else show_facts(found)
        return
    components = found
    if as_json:
        say(json.dumps([_described(component) for component in components], indent=2))
    else:
        show_table("", INSPECT_COLUMNS, map(_inspect_row, components))
        for component in components:
            say(f"{component.stage}: can become {', '.join(can_become(component.stage))}")
            for line in component.problems.lines():
                say(f"{component.path}: {line}")
            for key, text in licence_fields(component.metadata).items():
                say(f"{component.stage}: {key}: {text}")
    if any(component.problems for component in components):
        raise SystemExit(FAILED)


def _components(path: Path) -> "list[Component] | dict[str, Any]":
    """The components at `path`, or the facts of the LoRA it is instead."""
    from ..converters.checkpoints.open_model import inspect as run

    try:
        model = run(path)
    except (LayoutError, UsageError):
        facts = _lora_facts(path)
        if facts is None:
            raise
        return facts
    for text in model.notes:
        note(text)
    return [*model.components.values(), *model.alternatives]


def _lora_facts(path: Path) -> dict[str, Any] | None:
    """What `lora inspect` says of the LoRA at `path`; None when it is none."""
    from ..converters.lora.inspect_lora import summary
    from ..converters.lora.read_formats import holds_lora, open_lora

    if not path.exists() or not holds_lora(path):
        return None
    return {"component": "lora", **summary(open_lora(path))}


def _described(component: "Component") -> dict[str, Any]:
    from ..converters.checkpoints.provenance import licence_fields
    from ..schemas.config_json import to_json

    return {
        "path": str(component.path),
        "component": component.stage,
        "layout": component.layout,
        "variant": component.variant,
        "dtypes": component.dtypes,
        "tensors": len(component.tensors),
        "parameters": component.parameters,
        "problems": component.problems.lines(),
        "can_become": can_become(component.stage),
        "config": to_json(component.config),
        "licence": licence_fields(component.metadata),
        "metadata": component.metadata,
    }


def _inspect_row(c: "Component") -> tuple[str, ...]:
    problems = str(sum(map(len, vars(c.problems).values()))) if c.problems else "none"
    return c.stage, c.layout, c.variant, ", ".join(c.dtypes), f"{c.parameters:,}", problems, str(c.path)


@click.command()
@click.argument("sources", metavar="SRC...", nargs=-1, required=True, type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="Folder to make, or one .safetensors file.")
@click.option("--to", required=True, type=click.Choice([layout.value for layout in Layout]), help="Layout to write.")
@click.option("--text-encoder", type=PATH, help="CLIP bigG text encoder: a Hugging Face folder or file.")
@click.option("--image-encoder", type=PATH, help="CLIP L image encoder: a Hugging Face folder or file.")
@click.option("--dtype", type=click.Choice([*DTYPES]), default="keep", show_default=True, help="Cast the weights.")
@click.option("--allow-overflow", is_flag=True, help="Let values too large for fp16 become infinite.")
@click.option("--variant", help="Weights to take from a folder that has several, such as bf16.")
@click.option("--lite", is_flag=True, help="Take prior_lite/ and decoder_lite/ where a folder has both sizes.")
@click.option("--ema", is_flag=True, help="Take averaged weights where a file has trained ones too.")
@click.option("--as-variant", default="", help="Variant to put into the names of diffusers files, such as bf16.")
@click.option("--shard-size", callback=_parse_shard_size, help="Cut larger diffusers components, e.g. 10GB.")
@click.option("--combined", is_flag=True, help="Folders of StableCascadeCombinedPipeline (diffusers).")
@click.option("--canonical", is_flag=True, help="Order tensors as the safetensors library does.")
@click.option("--force", is_flag=True, help="Replace files of the same names, or an earlier output.")
def convert(
    sources: tuple[Path, ...],
    output: Path,
    to: str,
    text_encoder: Path | None,
    image_encoder: Path | None,
    dtype: str,
    allow_overflow: bool,
    variant: str | None,
    lite: bool,
    ema: bool,
    as_variant: str,
    shard_size: int | None,
    combined: bool,
    canonical: bool,
    force: bool,
) -> None:
    """Rewrite checkpoints in another layout; without --dtype, bit for bit the same weights.

    Example: cascadekit convert stage_a.safetensors stage_b.safetensors stage_c.safetensors
    --text-encoder CLIP-ViT-bigG-14 -o model --to diffusers
    """
    from ..converters.checkpoints.convert import convert as run

    paths = all_local(sources, variant, lite=lite)
    with byte_progress() as start_file:
        done = run(
            paths,
            output,
            to,
            text_encoder=maybe_local(text_encoder),
            image_encoder=maybe_local(image_encoder),
            dtype=dtype,
            allow_overflow=allow_overflow,
            variant=variant,
            lite=lite,
            ema=ema,
            as_variant=as_variant,
            shard_size=shard_size,
            combined=combined,
            canonical=canonical,
            force=force,
            start_file=start_file,
        )
    for text in done.notes:
        note(text)
    say(f"wrote {output} ({', '.join(map(str, done.files)) or to})")
