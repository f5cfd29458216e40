"""The part of `generate` that generates the images of the prompts on the command line."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .console import note, say
from .generate_common import note_cut_prompts, note_memory, open_cascade, require_previewer
from .progress import step_bars, step_progress


def generate_prompts(
    bundle: Path,
    engine: Mapping[str, Any],
    prompts: Sequence[str],
    fields: Mapping[str, Any],
    *,
    seeds: Sequence[int],
    like: Path | None,
    output: Path,
    images: int,
    batch: int | None,
    preview_every: int | None,
    force: bool,
) -> None:
    """Generate `images` images of each prompt and print a line for each file.

    `engine` has the options of MACHINERY. `fields` are those of all requests, with the settings of `like` among them.
    """
    from ..runtime.batch.image_files import ImageFiles, generate_files
    from ..runtime.batch.prompt_requests import prompt_requests
    from ..runtime.images.metadata import changes

    with open_cascade(bundle, **engine) as cascade:
        require_previewer(cascade, preview_every)
        if like and (other := changes(fields, cascade.engine, cascade.manifest)):
            note(f"{like} was made with {', '.join(other)}: pixels may differ")
        requests = prompt_requests(cascade.manifest, prompts, images, seeds, fields)
        sources = [bundle, like] if like else [bundle]
        files = ImageFiles.planned(requests, output, sources=sources, batch=batch, force=force)
        note_cut_prompts(requests, cascade)
        note_memory(requests, cascade, files.together)
        with step_progress() as progress:
            for done in generate_files(cascade, files, step_bars(progress), preview_every=preview_every):
                image = done.image
                say(f"wrote {done.path} ({image.image.width}x{image.image.height}, seed {image.request.seed})")
