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
    images: int,
    **files: Any,
) -> None:
    """Generate `images` images of each prompt and print a line for each file.

    `engine` has the options of MACHINERY. `fields` are those of all requests, with the settings of `like` among them.
    `files` are the options of `generate_files`."""
    from ..runtime.batch.image_files import generate_files, most_together
    from ..runtime.batch.prompt_requests import prompt_requests
    from ..runtime.images.metadata import changes

    with open_cascade(bundle, **engine) as cascade:
        require_previewer(cascade, files["preview_every"])
        if like and (other := changes(fields, cascade.engine, cascade.manifest)):
            note(f"{like} was made with {', '.join(other)}: pixels may differ")
        requests = prompt_requests(cascade.manifest, prompts, images, seeds, fields)
        note_cut_prompts(requests, cascade)
        note_memory(requests, cascade, most_together(requests[0].settings, files["batch"]))
        sources = [bundle, like] if like else [bundle]
        with step_progress() as progress:
            for done in generate_files(cascade, requests, on_step=step_bars(progress), sources=sources, **files):
                image = done.image
                say(f"wrote {done.path} ({image.image.width}x{image.image.height}, seed {image.request.seed})")
