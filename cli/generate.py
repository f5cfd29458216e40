"""The command `generate`."""

from pathlib import Path
from typing import Any

import click

from ..schemas.limits import MAX_IMAGES
from .generate_common import OPENING, request_fields
from .generate_options import BATCH, HELP_GROUPS, looks, machinery, together
from .generate_prompts import generate_prompts
from .help import HelpfulCommand
from .options import AS_JSON, C2PA, PATH, SEED, volume_options

UNQUOTED_WORDS = 3  # single words from which on the quotes were probably forgotten


@click.command(cls=HelpfulCommand, groups=HELP_GROUPS)
@click.argument("bundle", type=PATH)
@click.argument("prompts", metavar="[PROMPT]...", nargs=-1)
@click.option(
    "-o",
    "--output",
    type=PATH,
    default=Path("images"),
    show_default=True,
    help="Folder, or a .png, .jpg or .webp file; with --prompts also s3://BUCKET/FOLDER.",
)
@click.option(
    "--like", type=PATH, help="Generate the image of this file by cascadekit again; other options change its settings."
)
@click.option(
    "--images", default=1, show_default=True, type=click.IntRange(1, MAX_IMAGES), help="Images for each prompt."
)
@click.option(
    "--seed",
    "seeds",
    type=SEED,
    multiple=True,
    help="Seed of the batch, or one seed for each image.  [default: random]",
)
@looks
@machinery
@click.option("--preview-every", type=click.IntRange(1), metavar="N", help="Save NAME.preview.png every N steps.")
@click.option("--force", is_flag=True, help="Replace an existing image file; generate all images of --prompts again.")
@together(BATCH)
@C2PA
@AS_JSON
@volume_options
def generate(
    bundle: Path,
    prompts: tuple[str, ...],
    like: Path | None,
    seeds: tuple[int, ...],
    prompt_file: Path | None,
    name: str | None,
    log: Path | None,
    keep_going: bool,
    ray: str | None,
    actors: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Generate images from an exported bundle.

    torch is not needed. Images are written as PNG, with all settings in them.

    Example: cascadekit generate bundle "an image of a shiba inu" --seed 0 -o shiba.png
    Four images of each prompt: cascadekit generate bundle "a cat" "a dog" --images 4 -o pets
    Another size, with a LoRA: cascadekit generate bundle "a fox" --size 1024x768 --lora style.safetensors:0.8
    A variation of a picture: cascadekit generate bundle "oil painting" --init-image photo.jpg --strength 0.6
    All prompts of a file: cascadekit generate bundle --prompts prompts.txt -o images
    The same on a cluster: cascadekit generate bundle --prompts prompts.txt -o images --ray head:6379
    An image again, with one change: cascadekit generate bundle --like shiba.png --prior-steps 30 -o more.png
    """
    from ..runtime.images.png import require_settings
    from ..schemas.request import loras_of
    from ..storage.bucket import BucketPath, output_folder

    base = require_settings(like) if like else {}
    engine = {key: options.pop(key) for key in OPENING}
    engine["loras"] = engine["loras"] or [(lora.name, lora.strength) for lora in loras_of(base)]
    strength = options["strength"]
    files = {key: options.pop(key) for key in ("output", "images", "batch", "preview_every", "force")}
    files["sign"] = options.pop("c2pa")
    fields = {**base, **request_fields(options, engine["loras"])}
    if prompt_file is not None:
        from ..runtime.batch.generate_batch import BatchSettings
        from .generate_prompt_file import generate_prompt_file

        if len(prompts) > 1 or len(seeds) > 1:
            raise click.UsageError("--prompts: give one PROMPT and one --seed at most; lines may have their own.")
        if prompts and prompt_file.suffix.lower() in ("", ".txt"):  # lines of other files may have none
            raise click.UsageError("--prompts: each line is a prompt; leave PROMPT out.")
        fields |= dict(zip(["prompt"], prompts, strict=False)) | dict(zip(["seed"], seeds, strict=False))
        files["output"], log = output_folder(files["output"]), log and output_folder(log)
        batch: dict[str, Any] = {"name": name, "log": log, "keep_going": keep_going, "bundle": bundle}
        settings = BatchSettings(prompt_file, **files, **batch)
        if actors and not ray:
            raise click.UsageError("--actors: are for --ray.")
        generate_prompt_file(engine, settings, fields, as_json=as_json, ray=ray, actors=actors)
        return
    _require_one_prompt(prompts)
    if isinstance(output_folder(files["output"]), BucketPath):
        raise click.UsageError("-o: an address of a bucket is for --prompts FILE.")
    if strength is not None and not fields.get("init_image"):
        raise click.UsageError("--strength: says how much of --init-image changes; give that picture, too.")
    if name or log or keep_going or ray or actors:
        raise click.UsageError("--name, --log, --keep-going, --ray and --actors are for --prompts FILE.")
    if not prompts and "prompt" not in fields:
        raise click.UsageError("Missing argument 'PROMPT...', or --like with an image to generate again, or --prompts.")
    generate_prompts(bundle, engine, prompts, fields, seeds=seeds, like=like, as_json=as_json, **files)


def _require_one_prompt(prompts: tuple[str, ...]) -> None:
    """Raise UsageError for words that look like one prompt without quotes; each would become an image."""
    if len(prompts) >= UNQUOTED_WORDS and not any(" " in prompt for prompt in prompts):
        raise click.UsageError(
            f'{len(prompts)} prompts of a single word: put one prompt in quotes, as in "{" ".join(prompts)}". For an '
            "image of each word, give them as lines to --prompts -."
        )
