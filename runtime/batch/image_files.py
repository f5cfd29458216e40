"""Generates the images of requests into files: one .png, or numbered ones in a folder."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

from ...schemas.request import Request
from ...schemas.settings import Settings
from ...schemas.stages import Stage
from ..cascade import Cascade
from ..generate_inputs import check_settings, most_images, open_pictures
from ..images.pictures import as_picture
from ..images.png import Sign, image_paths, remove_preview, require_free_previews, save_numbered, save_png, save_preview
from ..sampling.loop import OnStep, Step
from .generate_requests import (
    GeneratedImage,
    generate_requests,
    given_pictures,
    images_together,
    request_groups,
    text_length,
)
from .picture_hashes import pictures_of


@dataclass(frozen=True)
class ImageFile:
    """A finished image, its file, and the seconds that it took: its share of those of the images made with it."""

    path: Path
    image: GeneratedImage
    seconds: float


def generate_files(
    cascade: Cascade,
    requests: Sequence[Request],
    output: Path,
    on_step: OnStep,
    *,
    sources: Sequence[Path] = (),
    batch: int | None = None,
    preview_every: int | None = None,
    force: bool = False,
    sign: Sign | None = None,
) -> Iterator[ImageFile]:
    """Generate the images into `output`, a folder or a .png file, and yield each once it is on disk.

    `batch` images are generated together. A preview appears beside each image every `preview_every` steps of the prior.
    `sign` signs each file, see `images.provenance`.

    Raises UsageError before anything is generated: when a file exists and `force` is not set, and when a file is one of
    `sources` or a picture of a request. A file in the way of a preview raises it too."""
    paths = image_paths(output, len(requests), force=force, sources=[*sources, *pictures_of(requests)])
    if preview_every:
        require_free_previews(paths)
    left = iter(paths)
    for group in request_groups(requests, most_together(requests[0].settings, batch), partial(text_length, cascade)):
        here = [next(left) for _ in group]
        follow = with_previews(on_step, here, preview_every)
        start = perf_counter()
        try:
            images = generate_requests(cascade, group, follow)
            seconds = (perf_counter() - start) / len(group)
            for path, image in zip(here, images, strict=True):
                if paths == [output]:
                    save_png(path, image.image, image.metadata, force=force, sign=sign)
                else:
                    path = save_numbered(path, image.image, image.metadata, sign=sign)
                yield ImageFile(path, image, seconds)
        finally:
            for path in here if preview_every else ():
                remove_preview(path)


def require_possible(
    requests: Sequence[Request], output: Path, *, sources: Sequence[Path] = (), force: bool = False
) -> None:
    """Raise UsageError for requests and an output that `generate_files` would refuse later; pictures are opened.

    All `requests` have the settings and pictures of the first."""
    request = requests[0]
    check_settings(request.settings, varies=request.init_image is not None)
    image_paths(output, len(requests), force=force, sources=[*sources, *pictures_of(requests)])
    given = given_pictures(request)
    for path in given.pop("image_prompts"):
        as_picture(path)
    open_pictures(request.settings, **given)


def most_together(settings: Settings, batch: int | None = None) -> int:
    """The most images of one size that are generated together: `batch`, or four of 1024x1024."""
    return min(batch or images_together(settings), most_images(settings))


def with_previews(on_step: OnStep, paths: Sequence[Path], every: int | None) -> OnStep:
    """`on_step`, which then also saves a preview beside each of `paths` every `every` steps of the prior."""

    def follow(stage: Stage, step: Step) -> None:
        on_step(stage, step)
        if every and stage is Stage.PRIOR and (step.index + 1) % every == 0:
            for path, picture in zip(paths, step.preview(), strict=True):
                with suppress(OSError):  # saving the image itself reports the error
                    save_preview(path, picture)

    return follow
