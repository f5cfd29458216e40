"""The part of `generate` that generates the images of the prompts on the command line."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..schemas.passes import passes_of
from .console import detail, note, say, say_json
from .generate_common import manifest_of, note_brackets, note_cut_prompts, note_memory, open_cascade, require_previewer
from .progress import run_progress

if TYPE_CHECKING:
    from ..runtime.batch.image_files import ImageFile


def generate_prompts(
    bundle: Path,
    engine: Mapping[str, Any],
    prompts: Sequence[str],
    fields: Mapping[str, Any],
    *,
    seeds: Sequence[int],
    like: Path | None,
    images: int,
    as_json: bool,
    **files: Any,
) -> None:
    """Generate `images` images of each prompt and print a line for each file, or JSON at the end.

    `engine` has the options of MACHINERY. `fields` are those of all requests, with the settings of `like` among them.
    `files` are the options of `generate_files`. All that can be refused is refused before the cascade is opened and
    LoRAs are merged."""
    from ..runtime.batch.generate_requests import request_groups
    from ..runtime.batch.image_files import generate_files, most_together, require_possible
    from ..runtime.batch.prompt_requests import prompt_requests
    from ..runtime.images.metadata import changes
    from ..runtime.memory.prediction import loaded_bytes

    manifest = manifest_of(bundle, engine)
    require_previewer(manifest, files["preview_every"])
    requests = prompt_requests(manifest, prompts, images, seeds, fields)
    sources = [bundle, like] if like else [bundle]
    require_possible(requests, files["output"], sources=sources, force=files["force"])
    note_brackets(requests)
    with open_cascade(bundle, **engine) as cascade:
        if like and (other := changes(fields, cascade.engine, cascade.manifest)):
            note(f"{like} was made with {', '.join(other)}: pixels may differ")
        note_cut_prompts(requests, cascade.tokenizer)
        together = most_together(requests[0].settings, files["batch"])
        note_memory(requests, cascade, together, previews=bool(files["preview_every"]))
        groups = [
            passes_of(cascade.manifest, group[0].settings, len(group)) for group in request_groups(requests, together)
        ]
        made = []
        with run_progress(groups, len(requests)) as progress:
            cascade.residency.on_load = lambda stage: progress.loading(stage, loaded_bytes(cascade.manifest, stage))
            for done in generate_files(cascade, requests, on_step=progress.step, sources=sources, **files):
                made.append(done)
                progress.image(len(made))
                if not as_json:
                    say(_line(done))
        detail(cascade.timings.line())
        if as_json:
            timings = cascade.timings.to_json()
            say_json([{**_facts(done), "timings": timings} for done in made])


def _line(done: "ImageFile") -> str:
    size = f"{done.image.image.width}x{done.image.image.height}"
    return f"wrote {done.path} ({size}, seed {done.image.request.seed}, {done.seconds:.1f} s)"


def _facts(done: "ImageFile") -> dict[str, Any]:
    request, image = done.image.request, done.image.image
    return {
        "path": str(done.path),
        "prompt": request.prompt,
        "seed": request.seed,
        "width": image.width,
        "height": image.height,
        "seconds": round(done.seconds, 3),
    }
