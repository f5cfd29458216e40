"""The part of `generate` that generates the images of the prompts on the command line."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .console import note, say
from .generate_common import manifest_of, note_brackets, note_cut_prompts, note_memory, open_cascade, require_previewer
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
    `files` are the options of `generate_files`. All that can be refused is refused before the cascade is opened and
    LoRAs are merged."""
    from ..runtime.batch.image_files import generate_files, most_together, require_possible
    from ..runtime.batch.prompt_requests import prompt_requests
    from ..runtime.images.metadata import changes

    manifest = manifest_of(bundle, engine)
    require_previewer(manifest, files["preview_every"])
    requests = prompt_requests(manifest, prompts, images, seeds, fields)
    sources = [bundle, like] if like else [bundle]
    require_possible(requests, files["output"], sources=sources, force=files["force"])
    note_brackets(requests)
    with open_cascade(bundle, **engine) as cascade:
        if like and (other := changes(fields, cascade.engine, cascade.manifest)):
            note(f"{like} was made with {', '.join(other)}: pixels may differ")
        note_cut_prompts(requests, cascade)
        note_memory(requests, cascade, most_together(requests[0].settings, files["batch"]))
        with step_progress() as progress:
            for done in generate_files(cascade, requests, on_step=step_bars(progress), sources=sources, **files):
                image = done.image
                say(f"wrote {done.path} ({image.image.width}x{image.image.height}, seed {image.request.seed})")
