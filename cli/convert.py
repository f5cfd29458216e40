"""The command `convert`."""

from pathlib import Path
from time import perf_counter
from typing import Any

import click

from ..schemas.block_types import WRITTEN
from ..schemas.comfy_formats import CHOICES
from ..schemas.dtypes import DTYPE_OPTIONS
from ..schemas.layouts import Layout
from ..schemas.sdnq_formats import SDNQ_CHOICES
from .console import detail, finish, note
from .dry_run import plan_only
from .help import HelpfulCommand
from .options import AS_JSON, DRY_RUN, PATH, volume_options
from .progress import byte_progress

TO = "Layout to write; modular is a diffusers folder with the code of its pipeline, for diffusers 0.42."

NO_PASSPORT = "Write no passports into the files; they say what each file was made of."


@click.command(cls=HelpfulCommand)
@click.argument("sources", metavar="SRC...", nargs=-1, required=True, type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="Folder to make, or one .safetensors or .gguf file.")
@click.option("--to", required=True, type=click.Choice([layout.value for layout in Layout]), help=TO)
@click.option("--text-encoder", type=PATH, help="CLIP bigG text encoder: a Hugging Face folder or file.")
@click.option("--image-encoder", type=PATH, help="CLIP L image encoder: a Hugging Face folder or file.")
@click.option(
    "--dtype", type=click.Choice([*DTYPE_OPTIONS]), default="keep", show_default=True, help="Cast the weights."
)
@click.option(
    "--quantize",
    type=click.Choice([name.lower() for name in (*WRITTEN, *CHOICES, *SDNQ_CHOICES)]),
    help="Store most Linears of prior and decoder in few bits: q for gguf, sdnq for diffusers, else for ComfyUI.",
)
@click.option("--allow-overflow", is_flag=True, help="Let values too large for fp16 become infinite.")
@click.option("--variant", help="Weights to take from a folder that has several, such as bf16.")
@click.option("--lite", is_flag=True, help="Take prior_lite/ and decoder_lite/ where a folder has both sizes.")
@click.option("--ema", is_flag=True, help="Take averaged weights where a file has trained ones too.")
@click.option("--as-variant", default="", help="Variant to put into the names of diffusers files, such as bf16.")
@click.option("--shard-size", help="Cut larger diffusers components, e.g. 10GB.")
@click.option("--combined", is_flag=True, help="Write the folders of StableCascadeCombinedPipeline (diffusers).")
@click.option("--canonical", is_flag=True, help="Order tensors as the safetensors library does.")
@click.option("--no-passport", "passport", is_flag=True, default=True, flag_value=False, help=NO_PASSPORT)
@click.option("--force", is_flag=True, help="Replace files of the same names, or an earlier output.")
@DRY_RUN
@AS_JSON
@volume_options
def convert(
    sources: tuple[Path, ...],
    output: Path,
    to: str,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Rewrite checkpoints in another layout.

    Without --dtype, the weights stay the same bit for bit. Weights that torchao, bitsandbytes or SDNQ quantised get
    their dtype back.

    Example: cascadekit convert stage_a.safetensors stage_b.safetensors stage_c.safetensors
    --text-encoder CLIP-ViT-bigG-14 -o model --to diffusers
    """
    from ..converters.checkpoints.convert import convert as run

    start = perf_counter()
    with plan_only(dry_run, as_json=as_json) as on_plan, byte_progress() as start_file:
        done = run(sources, output, to, **options, say=note, start_file=start_file, on_plan=on_plan)
    for text in done.details:
        detail(text)
    for text in done.notes:
        note(text)
    sizes = {str(file): (output / file).stat().st_size for file in done.files or [Path()]}
    seconds = perf_counter() - start
    facts = {"output": str(output), "layout": to, "files": sizes, "seconds": round(seconds, 3), "notes": done.notes}
    counted = f"{len(sizes)} file{'' if len(sizes) == 1 else 's'}, {sum(sizes.values()) / 1e6:.1f} MB"
    finish(f"wrote {output} ({to}, {counted}, {seconds:.1f} s)", facts, as_json=as_json)
