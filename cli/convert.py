"""The command `convert`."""

from pathlib import Path
from typing import Any

import click

from ..schemas.dtypes import DTYPE_OPTIONS
from ..schemas.folders import parse_size
from ..schemas.layouts import Layout
from .console import note, say
from .options import PATH, all_local, maybe_local
from .progress import byte_progress


def _parse_shard_size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    try:
        return parse_size(value) if value is not None else None
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command()
@click.argument("sources", metavar="SRC...", nargs=-1, required=True, type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="Folder to make, or one .safetensors file.")
@click.option("--to", required=True, type=click.Choice([layout.value for layout in Layout]), help="Layout to write.")
@click.option("--text-encoder", type=PATH, help="CLIP bigG text encoder: a Hugging Face folder or file.")
@click.option("--image-encoder", type=PATH, help="CLIP L image encoder: a Hugging Face folder or file.")
@click.option(
    "--dtype", type=click.Choice([*DTYPE_OPTIONS]), default="keep", show_default=True, help="Cast the weights."
)
@click.option("--allow-overflow", is_flag=True, help="Let values too large for fp16 become infinite.")
@click.option("--variant", help="Weights to take from a folder that has several, such as bf16.")
@click.option("--lite", is_flag=True, help="Take prior_lite/ and decoder_lite/ where a folder has both sizes.")
@click.option("--ema", is_flag=True, help="Take averaged weights where a file has trained ones too.")
@click.option("--as-variant", default="", help="Variant to put into the names of diffusers files, such as bf16.")
@click.option("--shard-size", callback=_parse_shard_size, help="Cut larger diffusers components, e.g. 10GB.")
@click.option("--combined", is_flag=True, help="Write the folders of StableCascadeCombinedPipeline (diffusers).")
@click.option("--canonical", is_flag=True, help="Order tensors as the safetensors library does.")
@click.option("--force", is_flag=True, help="Replace files of the same names, or an earlier output.")
def convert(
    sources: tuple[Path, ...],
    output: Path,
    to: str,
    text_encoder: Path | None,
    image_encoder: Path | None,
    **options: Any,
) -> None:
    """Rewrite checkpoints in another layout.

    Without --dtype, the weights stay the same bit for bit.

    Example: cascadekit convert stage_a.safetensors stage_b.safetensors stage_c.safetensors
    --text-encoder CLIP-ViT-bigG-14 -o model --to diffusers
    """
    from ..converters.checkpoints.convert import convert as run

    paths = all_local(sources, options["variant"], lite=options["lite"])
    options["text_encoder"], options["image_encoder"] = maybe_local(text_encoder), maybe_local(image_encoder)
    with byte_progress() as start_file:
        done = run(paths, output, to, **options, start_file=start_file)
    for text in done.notes:
        note(text)
    say(f"wrote {output} ({', '.join(map(str, done.files)) or to})")
