"""The command `generate`."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..schemas.limits import MAX_IMAGES, MAX_PIXELS_TOGETHER
from .console import note, say, step_progress
from .generate_common import (
    OPENING,
    note_cut_prompts,
    note_memory,
    open_cascade,
    request_fields,
    require_previewer,
    steps_shown,
)
from .generate_options import BATCH, looks, machinery, together
from .options import PATH

if TYPE_CHECKING:
    from ..schemas.settings import Settings


@click.command()
@click.argument("bundle", type=PATH)
@click.argument("prompts", metavar="[PROMPT]...", nargs=-1)
@click.option("-o", "--output", type=PATH, default=Path("images"), show_default=True, help="Folder or .png file.")
@click.option("--like", type=PATH, help="A PNG made by cascadekit: generate it again, changed by the other options.")
@click.option(
    "--images", default=1, show_default=True, type=click.IntRange(1, MAX_IMAGES), help="Images for each prompt."
)
@click.option(
    "--seed",
    "seeds",
    type=click.IntRange(-(2**63), 2**64 - 1),
    multiple=True,
    help="One for the batch, or one for each image.",
)
@looks
@machinery
@click.option("--preview-every", type=click.IntRange(1), metavar="N", help="Show NAME.preview.png every N steps.")
@click.option("--force", is_flag=True, help="Replace an existing .png file; generate all images of --prompts again.")
@together(BATCH)
def generate(
    bundle: Path,
    prompts: tuple[str, ...],
    output: Path,
    like: Path | None,
    images: int,
    seeds: tuple[int, ...],
    batch: int | None,
    preview_every: int | None,
    force: bool,
    prompt_file: Path | None,
    name: str | None,
    log: Path | None,
    keep_going: bool,
    **options: Any,
) -> None:
    """Generate images from an exported bundle.

    torch is not needed.

    Example: cascadekit generate bundle "an image of a shiba inu" --seed 0 -o shiba.png
    """
    from ..runtime.batch.generate_batch import BatchSettings
    from ..runtime.batch.generate_requests import generate_requests, images_together, request_groups, text_length
    from ..runtime.batch.picture_hashes import pictures_of
    from ..runtime.batch.prompt_requests import prompt_requests
    from ..runtime.images.metadata import changes
    from ..runtime.images.png import (
        image_paths,
        remove_preview,
        require_free_previews,
        require_settings,
        save_numbered,
        save_png,
    )
    from ..schemas.request import loras_of
    from .generate_batch import generate_prompt_file

    engine = {name: options.pop(name) for name in OPENING}
    base = require_settings(like) if like else {}
    engine["loras"] = engine["loras"] or [(lora.name, lora.strength) for lora in loras_of(base)]
    merged = [{"name": name, "strength": strength} for name, strength in engine["loras"]]
    common = {**base, **request_fields(options), **({"loras": merged} if merged else {})}
    if prompt_file is not None:
        if len(prompts) > 1 or len(seeds) > 1:
            raise click.UsageError("--prompts: give one PROMPT and one --seed at most; lines may have their own.")
        common |= dict(zip(["prompt"], prompts, strict=False)) | dict(zip(["seed"], seeds, strict=False))
        chosen = BatchSettings(
            prompt_file,
            output,
            name=name,
            log=log,
            images=images,
            batch=batch,
            preview_every=preview_every,
            force=force,
            keep_going=keep_going,
            bundle=bundle,
        )
        generate_prompt_file(engine, chosen, common)
        return
    if name or log or keep_going:
        raise click.UsageError("--name, --log and --keep-going are for --prompts FILE.")
    if not prompts and "prompt" not in common:
        raise click.UsageError("Missing argument 'PROMPT...', or --like with an image to generate again, or --prompts.")
    with open_cascade(bundle, **engine) as cascade:
        require_previewer(cascade, preview_every)
        if like and (other := changes(base, cascade.engine, cascade.manifest)):
            note(f"{like} was made with {', '.join(other)}: pixels may differ")
        requests = prompt_requests(cascade.manifest, prompts, images, seeds, common)
        paths = image_paths(output, len(requests), force=force, sources=[bundle, *_given(like), *pictures_of(requests)])
        is_file = paths == [output]
        if preview_every:
            require_free_previews(paths)
        note_cut_prompts(requests, cascade)
        most = min(batch or images_together(requests[0].settings), _room(requests[0].settings))
        note_memory(requests, cascade, most)
        left = iter(paths)
        with step_progress() as progress:
            for group in request_groups(requests, most, partial(text_length, cascade)):
                here = [next(left) for _ in group]
                on_step = steps_shown(progress, here, preview_every)
                try:
                    for path, drawn in zip(here, generate_requests(cascade, group, on_step), strict=True):
                        if is_file:
                            save_png(path, drawn.image, drawn.metadata, force=force)
                        else:
                            path = save_numbered(path, drawn.image, drawn.metadata)
                        say(f"wrote {path} ({drawn.image.width}x{drawn.image.height}, seed {drawn.request.seed})")
                finally:
                    for path in here if preview_every else ():
                        remove_preview(path)


def _given(path: Path | None) -> list[Path]:
    return [] if path is None else [path]


def _room(settings: "Settings") -> int:
    """The most images that one call may generate, whatever --batch says."""
    return max(1, MAX_PIXELS_TOGETHER // (settings.width * settings.height))
