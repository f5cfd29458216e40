"""Generates the images of requests into files: one .png, or numbered ones in a folder."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...schemas.limits import MAX_PIXELS_TOGETHER
from ...schemas.request import Request
from ...schemas.stages import Stage
from ..cascade import Cascade
from ..images.png import image_paths, remove_preview, require_free_previews, save_numbered, save_png, save_preview
from ..sampling.loop import OnStep, Step
from .image_jobs import pictures_of
from .requests import GeneratedImage, generate_requests, request_groups, text_length
from .run import images_together


@dataclass(frozen=True)
class ImageFiles:
    """The requests of one run and the file of each image; at most `together` images are generated at once."""

    requests: Sequence[Request]
    paths: Sequence[Path]
    together: int
    is_file: bool  # the output is one .png file
    force: bool

    @classmethod
    def planned(
        cls,
        requests: Sequence[Request],
        output: Path,
        *,
        sources: Sequence[Path] = (),
        batch: int | None = None,
        force: bool = False,
    ) -> "ImageFiles":
        """The files below `output`, a folder or a .png file. `batch` None allows four images of 1024x1024.

        Raises UsageError when a file exists and `force` is not set, or when it is one of `sources` or a picture."""
        paths = image_paths(output, len(requests), force=force, sources=[*sources, *pictures_of(requests)])
        size = requests[0].settings
        room = max(1, MAX_PIXELS_TOGETHER // (size.width * size.height))
        together = min(batch or images_together(size), room)
        return cls(requests, paths, together, is_file=paths == [output], force=force)


@dataclass(frozen=True)
class ImageFile:
    """A finished image and its file."""

    path: Path
    image: GeneratedImage


def generate_files(
    cascade: Cascade, files: ImageFiles, on_step: OnStep, *, preview_every: int | None = None
) -> Iterator[ImageFile]:
    """Generate the images and yield each once it is on disk. A preview appears beside it every `preview_every` steps.

    Raises UsageError when an image cannot be written, or when another file has the name of a preview."""
    if preview_every:
        require_free_previews(files.paths)
    left = iter(files.paths)
    for group in request_groups(files.requests, files.together, partial(text_length, cascade)):
        paths = [next(left) for _ in group]
        follow = with_previews(on_step, paths, preview_every)
        try:
            for path, image in zip(paths, generate_requests(cascade, group, Path(), follow), strict=True):
                if files.is_file:
                    save_png(path, image.image, image.metadata, force=files.force)
                    yield ImageFile(path, image)
                else:
                    yield ImageFile(save_numbered(path, image.image, image.metadata), image)
        finally:
            for path in paths if preview_every else ():
                remove_preview(path)


def with_previews(on_step: Callable[[Stage, Step], object], paths: Sequence[Path], every: int | None) -> OnStep:
    """`on_step`, which then also saves a preview beside each of `paths` every `every` steps of the prior."""

    def follow(stage: Stage, step: Step) -> None:
        on_step(stage, step)
        if every and stage is Stage.PRIOR and (step.index + 1) % every == 0:
            for path, picture in zip(paths, step.preview(), strict=True):
                with suppress(OSError):  # saving the image itself reports the error
                    save_preview(path, picture)

    return follow
